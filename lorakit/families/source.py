"""Where a model's parts come from, and how they are read: what the settings of all families have.

What is in a folder, and what is wrong with one, is found in folders.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core import settings as core_settings
from lorakit.core.quiet import quiet_libraries
from lorakit.families import folders, vae

Parts = Mapping[str, str]  # the names of parts to the files that configure them


class Settings(core_settings.Settings):
    """Base of the settings of families."""

    path: str
    """A diffusers folder or a hub name."""


@dataclass(frozen=True)
class Source:
    """A complete model of a family: `folder` has its configurations, tokenizers and weights."""

    folder: Path

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        return folders.read_config(self.folder, part, file)

    def has(self, part: str) -> bool:
        """Whether the model has the `part`; some can do without."""
        return folders.names(self.folder, part)

    def components(self, **kinds: Any) -> dict[str, Any]:
        """The modules of these names and classes, in fp32, frozen and in eval mode; and the VAE, whatever its class."""
        quiet_libraries()
        autoencoder = vae.load(self.folder, kinds.pop("vae", None))
        found = {name: folders.load_component(kind, self.folder / name) for name, kind in kinds.items()}
        found["vae"] = autoencoder
        for module in found.values():
            module.requires_grad_(False).eval()
        return found

    def stock_pipeline(self, kind: str, **options: Any) -> Any:
        """A fresh stock pipeline of the class `kind` in fp32; `options` are its class's own."""
        import diffusers

        parts = {file.parent.name for file in self.folder.glob("*/*.safetensors")}
        return folders.load_pipeline(getattr(diffusers, kind), self.folder, parts, **options)

    def fingerprint(self, *parts: str) -> str:
        """A digest of the files of `parts`."""
        return folders.fingerprint(*(self.folder / part for part in parts))


def described(settings: Settings, parts: Parts, pipelines: Sequence[str], *, optional: Parts | None = None) -> Source:
    """The model as its configurations and tokenizers tell: weights of one on the hub are not fetched for it.

    Raises InputError as `opened` does.
    """
    here = settings.path == "embedded" or Path(settings.path).expanduser().is_dir()
    return _checked(folders.resolve(settings.path, weights=False), parts, pipelines, optional, weights=here)


def opened(settings: Settings, parts: Parts, pipelines: Sequence[str], *, optional: Parts | None = None) -> Source:
    """The model, with its weights; of `optional` parts those that its index names.

    Raises InputError where it is not complete, is of none of these `pipelines`, or holds pickles.
    """
    return _checked(folders.resolve(settings.path), parts, pipelines, optional, weights=True)


def _checked(folder: Path, parts: Parts, pipelines: Sequence[str], optional: Parts | None, *, weights: bool) -> Source:
    folders.check(folder, parts, pipelines=pipelines, weights=weights)
    if named := {part: file for part, file in (optional or {}).items() if folders.names(folder, part)}:
        folders.check(folder, named, pipelines=pipelines, weights=weights)
    return Source(folder)
