"""What an adapter file says of itself, for programs that list, sort or refuse files by it.

No path, user, host or date is among it, unless somebody asks for a date: a file is made to be passed on, and equal runs
give equal bytes. What a training knows of itself comes from verbs/provenance.py, what the weights do is digests.py's.
"""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path

from lorakit.adapters.state import FIRST, METADATA_KEY, AdapterState
from lorakit.core import settings as core_settings
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Neutral
from lorakit.export.alphas import ENTRY
from lorakit.families.protocol import Family

TITLES = ("modelspec.title", "ss_output_name")
# what belongs to the bytes of one file, or to its layout, and is made anew for each
_OWN = (
    "format",
    ENTRY,
    METADATA_KEY,
    "modelspec.hash_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
)
_OWN_ENDS = ("adapter_config.json", "lorakit.digest", "sshs_model_hash", "sshs_legacy_hash")
_PATH = re.compile(r'(^|["\'\s=(])(~?(/[^/\s"\']+){2,}|[A-Za-z]:\\)')
_THUMBNAIL = 256  # pixels of the longer side


class AboutSettings(core_settings.Settings):
    """What an adapter's file says to people; each also an option of `lorakit export`."""

    title: Neutral[str | None] = None
    """The name that programs show. Left out: the file's."""
    author: Neutral[str | None] = None
    """Who made it."""
    description: Neutral[str | None] = None
    """What it is for."""
    license: Neutral[str | None] = None
    """The terms it may be used by, e.g. "CC-BY-4.0"."""
    trigger: Neutral[str | None] = None
    """The words that call up what was learnt. Left out: the sources' triggers."""

    def entries(self) -> dict[str, str]:
        named = {
            "title": self.title,
            "author": self.author,
            "description": self.description,
            "license": self.license,
            "trigger_phrase": self.trigger,
        }
        said = {f"modelspec.{name}": text for name, text in named.items() if text is not None}
        return said | ({"ss_output_name": self.title} if self.title is not None else {})


def adapter_metadata(state: AdapterState, family: Family, *, name: str) -> dict[str, str]:
    """kohya's `ss_…` entries and those of the model specification, all texts; `name` is what programs show."""
    ranks = {len(state.tensors[layer + FIRST]) for layer in state.layers()}
    alphas = set(state.alphas.values())
    return {
        "ss_network_module": "networks.lora",
        # "Dynamic" is what kohya's own tools write where layers differ
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        **dict.fromkeys(TITLES, name),
        **family.metadata(),
    }


def carried(metadata: Mapping[str, str], family: Family, *, name: str) -> dict[str, str]:
    """The entries of a file called `name` that hold for the same adapter in any other one.

    Not those that belong to its layout or its bytes, a title that is only its name, what the family knows better, and
    what holds a path: another program's file may tell more of its author than he meant to pass on.
    """
    kept = {
        key: text
        for key, text in metadata.items()
        if key not in _OWN and not key.endswith(_OWN_ENDS) and key not in family.metadata() and not _PATH.search(text)
    }
    return {key: text for key, text in kept.items() if key not in TITLES or text != name}


def thumbnail(picture: Path) -> dict[str, str]:
    """The entry that shows `picture`, made small, as a data URI. Raises InputError where it is none."""
    from PIL import Image

    try:
        with Image.open(picture) as opened:
            small = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise InputError(f"--thumbnail {printable(picture)} is no picture that can be read.") from None
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=85)
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"}
