"""Where a model's parts come from, and how they are read: the settings that all families have, and what they do.

What is in a folder, and what is wrong with one, is found in folders.py; small weights are made in quantized.py, and
multiplied as they are in eightbit.py.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lorakit.core import settings as core_settings
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.quiet import quiet_libraries
from lorakit.families import folders, vae

Parts = Mapping[str, str]  # the names of parts to the files that configure them
SINGLE = ".safetensors"
# how the keys of a single file begin, of its VAE and of its text encoders; others are the backbone's
_VAE, _TEXT = ("first_stage_model.", "vae."), ("cond_stage_model.", "conditioner.", "text_encoders.")
_T5 = ".t5xxl."
_BACKBONES = ("unet", "transformer")


class Settings(core_settings.Settings):
    """Base of the settings of families."""

    path: str
    """A diffusers folder, a hub name, or one .safetensors file in the layout that the model was published in."""
    config: str | None = None
    """Beside a single file: the diffusers folder, or hub name, of such a model. Its configurations and tokenizers are
    read, and the weights that the file lacks."""
    revision: str | None = Field(None, pattern=r"^[\w./-]+$")
    """Which version of a model on the hub: a commit, branch or tag. Left out: the newest, and the run's own recipe
    names the commit."""
    variant: str | None = Field(None, pattern=r"^\w+$")
    """Which of several files of weights, "fp16" for instance; parts without it are read from what they have. Left out:
    those of full precision, where there are such."""
    vae: str | None = None
    """Another VAE of the same latents: a diffusers folder, a hub name or a .safetensors file. Left out: the model's."""
    vae_tiling: int | None = Field(None, ge=64)
    """Pictures larger than this, in pixels a side, go through the VAE in tiles, which saves memory and shows in faint
    seams. Left out: never."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """What the frozen weights are read and kept in, all but the VAE's. Left out: as run.precision."""
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    """Keep the frozen linear layers of the backbone's and the text encoders' blocks in 4 or 8 bits. They multiply in
    run.precision, and what is exported changes the full weights."""
    compute: Literal["int8", "fp8"] | None = None
    """Multiply in 8 bits with the frozen linear layers of the backbone's blocks, forward and on the way back, and keep
    them so: int8 on GPUs from Ampere on, fp8 from Ada on. Adapters stay in run.precision, and what is exported changes
    the full weights. Without a GPU it is there to be tried."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Settings":
        if self.compute and self.quantize not in (None, self.compute):
            raise ValueError(
                f'compute = "{self.compute}" keeps the backbone\'s weights in {self.compute} too, and quantize = '
                f'"{self.quantize}" would have them otherwise: give both the same, or leave quantize out.'
            )
        return self


_LATER: ContextVar[tuple[str, ...]] = ContextVar("later", default=())


@contextlib.contextmanager
def later(names: tuple[str, ...]) -> Iterator[None]:
    """Models that are made within it have no weights yet in components whose names begin so: they are read when they
    are to be `at_hand`; see `protocol.Family`."""
    token = _LATER.set(names)
    try:
        yield
    finally:
        _LATER.reset(token)


@dataclass(frozen=True)
class Source:
    """A complete model: `folder` has its configurations and tokenizers, and its weights but for those of `file`, a
    single one, and of `vae`, a folder or file. The `settings` say how they are read.
    """

    folder: Path
    file: Path | None = None
    vae: Path | None = None
    settings: Settings | None = None

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        return folders.read_config(self.folder, part, file)

    def has(self, part: str) -> bool:
        """Whether the model has the `part`; some can do without."""
        return folders.names(self.folder, part)

    @property
    def dtype(self) -> Any:
        """What weights are kept in where the settings say so."""
        import torch

        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return kinds.get(self._said("dtype") or "")

    def components(self, **kinds: Any) -> dict[str, Any]:
        """The modules of these names and classes, and the VAE whatever its class, as `read` reads them, but for those
        that are read `later`."""
        kinds = {"vae": None, **kinds}
        # in a single file they lie together with the backbone
        later = [] if self.file else [name for name in kinds if name.startswith(_LATER.get())]
        found = self.read({name: kind for name, kind in kinds.items() if name not in later})
        for name in later:
            kind = vae.kind(kinds[name]) if name == "vae" else kinds[name]
            found[name] = folders.hollow_component(kind, self.folder / name).requires_grad_(False).eval()
        return {name: found[name] for name in (*(name for name in kinds if name != "vae"), "vae")}

    def read(self, kinds: Mapping[str, Any]) -> dict[str, Any]:
        """The modules of these names and classes: frozen, in eval mode, read as the settings say."""
        quiet_libraries()
        found = self._read(kinds, self.dtype)
        if (tiling := self._said("vae_tiling")) and "vae" in found:
            vae.tile(found["vae"], tiling)
        for name, module in found.items():
            module.requires_grad_(False).eval()
            if name in _BACKBONES and self._said("compute"):
                from lorakit.families.eightbit import compute_in

                compute_in(module, self._said("compute"))
            if name != "vae" and self._said("quantize"):
                from lorakit.families.quantized import quantize

                quantize(module, self._said("quantize"))
        return found

    def stock_pipeline(self, kind: str, **options: Any) -> Any:
        """A fresh stock pipeline of the class `kind` in fp32; `options` are its class's own, and parts given to it."""
        import diffusers

        parts = [path.parent for path in self.folder.glob(f"*/*{SINGLE}")]
        kinds = {name: made for name, made in folders.classes(self.folder).items() if name not in options}
        elsewhere = {name: kinds[name] for name in self._elsewhere(kinds)}
        options = {**self._read(elsewhere, None), **options}
        return folders.load_pipeline(getattr(diffusers, kind), self.folder, parts, self._said("variant"), **options)

    def fingerprint(self, *parts: str) -> str:
        """A digest of the files of `parts`, and of how they are read."""
        paths = [self.vae if part == "vae" and self.vae else self.folder / part for part in parts]
        small = [self._said("quantize")] if any(part.startswith("text_encoder") for part in parts) else []
        tiles = [f"tiles{self._said('vae_tiling')}"] if "vae" in parts and self._said("vae_tiling") else []
        own = folders.fingerprint(*paths, *([self.file] if self.file else []))
        marks = [str(mark) for mark in (self._said("variant"), *small, *tiles) if mark]
        return "-".join([own, *marks])

    def _said(self, key: str) -> Any:
        return getattr(self.settings, key, None)

    def _elsewhere(self, kinds: Iterable[str]) -> list[str]:
        """Those of the components that are not, or not all, in the folder."""
        return list(kinds) if self.file else ["vae"] if self.vae else []

    def _read(self, kinds: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        kinds = dict(kinds)
        found: dict[str, Any] = {}
        if self.vae and "vae" in kinds:
            found["vae"] = vae.load(self.vae, kinds.pop("vae"), config=self.folder / "vae")
        if self.file:
            found |= self._read_file(self.file, kinds, dtype)
        for name, kind in kinds.items():
            if name not in found and name == "vae":
                found[name] = vae.load(self.folder / name, kind)
            elif name not in found:
                found[name] = folders.load_component(kind, self.folder / name, dtype, self._said("variant"))
        return found

    def _read_file(self, file: Path, kinds: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        """Those components that are in the single `file`: of many models it is the backbone alone."""
        keys = folders.keys(file)
        if not any(key.startswith(_VAE) for key in keys):
            name = next(name for name in kinds if name in _BACKBONES)
            return {name: folders.load_from_file(kinds[name], file, self.folder / name, dtype)}
        text = any(key.startswith(_TEXT) for key in keys)
        t5 = any(_T5 in key for key in keys)
        others = {name: kind for name, kind in kinds.items() if name.startswith("text_encoder")}
        lacking = {name: kind for name, kind in others.items() if not (t5 if "T5" in kind.__name__ else text)}
        given = {
            name: folders.load_component(kind, self.folder / name, dtype, self._said("variant"))
            for name, kind in lacking.items()
        }
        pipeline = folders.load_single_file(file, self.folder, dtype, **given)
        vae.decoding_in_fp32(pipeline.vae)
        return {name: getattr(pipeline, name) for name in kinds}


def described(settings: Settings, parts: Parts, pipelines: Sequence[str], *, optional: Parts | None = None) -> Source:
    """The model as its configurations and tokenizers tell: weights of one on the hub are not fetched for it.

    Raises InputError as `opened` does.
    """
    return _found(settings, parts, pipelines, optional, weights=False)


def opened(settings: Settings, parts: Parts, pipelines: Sequence[str], *, optional: Parts | None = None) -> Source:
    """The model, with its weights; of `optional` parts those that its index names.

    Raises InputError where it is not complete, is of none of these `pipelines`, or holds pickles.
    """
    return _found(settings, parts, pipelines, optional, weights=True)


def pinned(settings: Settings) -> Settings:
    """`settings` with the commit of a model that is fetched from the hub, where none is said."""
    if settings.revision is not None or folders.is_local(settings.path):
        return settings
    folder = folders.resolve(settings.path, weights=False)
    return settings.model_copy(update={"revision": folder.name}) if folder.parent.name == "snapshots" else settings


def _found(
    settings: Settings, parts: Parts, pipelines: Sequence[str], optional: Parts | None, *, weights: bool
) -> Source:
    problems = []
    if settings.compute is not None:
        from lorakit.families import eightbit

        problems += eightbit.problems(settings.compute)
    file = Path(settings.path).expanduser()
    single = file.suffix == SINGLE and file.is_file()
    if single and settings.config is None:
        problems.append(
            f"model.path = {printable(file)} is one file: give a diffusers folder of such a model as model.config, "
            "which has its configurations and tokenizers."
        )
    if settings.config is not None and not single:
        problems.append("model.config goes with a model.path that is one .safetensors file: leave it out.")
    named, key = (settings.config or "", "model.config") if single else (settings.path, "model.path")
    if settings.revision is not None and folders.is_local(named):
        problems.append("model.revision chooses among versions on the hub, and the model is a folder: leave it out.")
    if problems:
        raise InputError(problems)
    folder = folders.resolve(named, weights=weights, revision=settings.revision, key=key)
    here = weights or folders.is_local(named)
    if optional := {part: at for part, at in (optional or {}).items() if folders.names(folder, part)}:
        parts = {**parts, **optional}
    folders.check(folder, parts, pipelines=pipelines, weights=here and not single, key=key)
    if settings.variant is not None and here and not single and not folders.has_variant(folder, settings.variant):
        raise InputError(
            f"model.variant = {settings.variant}: {printable(folder)} has no weights called "
            f"*.{settings.variant}{SINGLE}: leave it out, or download them."
        )
    return Source(folder, file if single else None, _other_vae(settings, folder, weights=weights), settings)


def _other_vae(settings: Settings, folder: Path, *, weights: bool) -> Path | None:
    """The folder or file of the VAE that stands in for the model's own in `folder`."""
    if settings.vae is None:
        return None
    file = Path(settings.vae).expanduser()
    if file.suffix == SINGLE and file.is_file():
        return file
    found = folders.resolve(settings.vae, weights=weights, key="model.vae")
    found = found if (found / "config.json").is_file() else found / "vae"
    own, other = (folders.read_config(at, "") for at in (folder / "vae", found))
    for key in ("_class_name", "latent_channels", "z_dim", "block_out_channels"):
        if own.get(key) != other.get(key):
            raise InputError(
                f"model.vae = {printable(found)} is of another make than the model's ({key} {printable(other.get(key))}"
                f" instead of {printable(own.get(key))}): the model cannot read its latents."
            )
    return found
