"""Filling the cache that a training reads: what of the data is encoded by which part of the family, under which name.

How work is shared and stored is `data/cache.py`'s affair. `lorakit cache` and `lorakit train` both come here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from lorakit.core.types import Text
from lorakit.data.cache import Filled, fill_latents, fill_text
from lorakit.data.dataset import Dataset
from lorakit.data.shards import Cache
from lorakit.export.files import DTYPES
from lorakit.families.protocol import Family
from lorakit.training.execution import lay_channels_last
from lorakit.training.processes import bar

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """The fingerprints that a loader reads by, `text` None where text is encoded in every step, and what was done."""

    latents: str
    text: str | None
    pictures: Filled
    captions: Filled


def text_encoder(data: Dataset, family: Family) -> Callable[[Sequence[str]], Text]:
    """The family's encoder as the data want it: with emphasis or without."""
    return partial(family.encode_text, weighted=True) if data.settings.weighted_tags else family.encode_text


def fill_cache(
    cache: Cache,
    data: Dataset,
    family: Family,
    *,
    precision: str,
    text: bool,
    check: Callable[[], object] = lambda: None,
) -> Encoded:
    """Encodes what `cache` lacks of the pictures and, if `text`, of the captions; all ranks together.

    Raises InputError for a picture that changed or whose latents are not finite, and what `check` raises, which is
    called after each entry; what was encoded until then is kept.
    """
    latents_name = f"{family.fingerprint('vae')}-fp32"  # families encode pictures in a safe precision
    marks = ["weighted"] if data.settings.weighted_tags else []
    if family.dtype != DTYPES[precision]:
        marks.append(str(family.dtype))
    encoders = [name for name in family.components if name not in (family.backbone, "vae")]  # adaptable or not
    text_name = "-".join([*(family.fingerprint(name) for name in encoders), precision, *marks])
    pictures = captions = Filled(0, 0)
    _lay_for_cpu(family)
    with contextlib.closing(bar(unit="item", label="caching")) as progress, torch.no_grad():

        def made(count: int) -> None:
            progress.update(count)
            check()

        if data.cached_latents:
            with _read_when_called(family, ["vae"]) as reading:
                edited = data.task == "edit"
                pictures = fill_latents(
                    cache,
                    data.all_latents(fingerprint=latents_name),
                    prepare=data.prepare,
                    encode=reading(family.encode_images),
                    encode_input=reading(lambda pixels: family.encode_given({"pixels": pixels})) if edited else None,
                    workers=data.settings.workers,
                    on_progress=made,
                )
        if text:
            with _read_when_called(family, encoders) as reading:
                captions = fill_text(
                    cache,
                    data.all_captions(),
                    encode=reading(text_encoder(data, family)),
                    fingerprint=text_name,
                    on_progress=made,
                )
    return Encoded(latents_name, text_name if text else None, pictures, captions)


def _lay_for_cpu(family: Family) -> None:
    """Lets the VAE's convolutions run faster on a CPU, if it is at hand. Where it stays for the training that is done
    whatever is cached: the last bits of what it says differ, and a resumed run finds more in the cache."""
    vae = family.components["vae"]
    if next(vae.parameters()).device.type == "cpu":
        lay_channels_last(vae)


@contextlib.contextmanager
def _read_when_called(family: Family, parts: Sequence[str]) -> Iterator[Callable[[Callable[[T], S]], Callable[[T], S]]]:
    """What is to encode, so that it has these parts of the family at hand from its first call on: a full cache needs
    none, and the weights of a large text encoder are not read for it."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def read() -> None:
            stack.enter_context(family.at_hand(parts))
            _lay_for_cpu(family)

        def reading(encode: Callable[[T], S]) -> Callable[[T], S]:
            def encoded(given: T) -> S:
                read()
                return encode(given)

            return encoded

        yield reading
