"""Floor 2: model families, one file each. What differs between models is here and nowhere else.

A family's module defines `PIPELINES` (the stock pipelines whose folders it reads), `Settings`, `load(settings) ->
Family`, `describe(settings) -> Description` (from its configurations and tokenizers alone), `around(components) ->
Names | None` (a stock pipeline's, where they are of this family), `recognises(keys)` (whether an adapter file is for
it), where names alone do not tell, `fits(tensors)` (whether by its sizes too), and `tiny() -> Family` (small, random
weights: it gets every family test).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.registry import Registry
from lorakit.core.settings import Settings, validate
from lorakit.core.start import collect_as_ever
from lorakit.families import folders
from lorakit.families.protocol import Description, Family, Names

DEFAULT = "sd"  # where none is named; the embedded base is of it too
SHARED = frozenset(  # files here that are no family
    {
        "protocol",
        "base",
        "source",
        "quantized",
        "eightbit",
        "kernels",
        "folders",
        "emphasis",
        "clip",
        "t5",
        "qwen",
        "gemma",
        "vae",
        "unet",
        "transformer",
        "packing",
        "sgm",
        "bfl",
    }
)
FAMILIES = Registry("lorakit.families", "family", SHARED)


def load(name: str, path: str, **settings: Any) -> Family:
    """The family `name` with the weights at `path` (a diffusers folder, or "embedded").

    Raises InputError for an unknown name or setting and for a folder that lacks a component.
    """
    made = validate_settings({"family": name, "path": path, **settings})
    family: Family = FAMILIES.module(name).load(made)
    return family


def named_at(path: str) -> str:
    """The family whose stock pipeline the model at `path` names; the default one where it names none of those.

    Raises InputError for a path that leads to no model.
    """
    folder = folders.resolve(path, weights=False)
    index = folder / "model_index.json"
    kind = folders.read_config(folder, "", index.name).get("_class_name") if index.is_file() else None
    return next((name for name in FAMILIES.names() if kind in FAMILIES.module(name).PIPELINES), DEFAULT)


def load_settings(
    settings: Settings, *, device: Any = "cpu", precision: str = "fp32", later: tuple[str, ...] = ()
) -> Family:
    """The family on `device`, its weights read and kept in `precision` ("bf16", …) where the settings say nothing.

    Components whose names begin with one of `later` are read when they are to be `at_hand`, and are away but then;
    from a single file all are read now.
    """
    from lorakit.families import source

    said: Any = settings
    if said.dtype is None:
        said = said.model_copy(update={"dtype": precision})
    with source.later(later):
        family: Family = FAMILIES.module(said.family).load(said)
    family.to(device, family.dtype)
    collect_as_ever()  # all that is large is imported
    return family


def pinned(settings: Settings) -> Settings:
    """`settings` with the commit of a model that is fetched from the hub, where no revision is said."""
    from lorakit.families import source

    return source.pinned(settings)  # type: ignore[arg-type]


def describe_settings(settings: Settings) -> Description:
    return FAMILIES.module(settings.family).describe(settings)  # type: ignore[attr-defined]


def describe(name: str, path: str, **settings: Any) -> Description:
    """What the data side needs to know of a model, without its weights."""
    return describe_settings(validate_settings({"family": name, "path": path, **settings}))


def tokenizers(path: str) -> dict[str, Any]:
    """The tokenizers of the model at `path` by component, without its weights. Raises InputError."""
    return folders.tokenizers(folders.resolve(path, weights=False))


def around(pipeline: Any) -> Names:
    """How adapter files call the layers of any stock pipeline's own components; nothing is loaded or changed.

    Raises InputError for a pipeline of no family that is known here.
    """
    # a compiled module has its own names before those of the module that it wraps
    components = {n: getattr(part, "_orig_mod", part) for n, part in getattr(pipeline, "components", {}).items()}
    return _around(components, f"a {type(pipeline).__name__}")


def outline(path: str) -> Names:
    """How adapter files call the layers of the model at `path`, from its configurations: no weights are read.

    Raises InputError for what is no model folder, or of no family that is known here.
    """
    return _around(folders.hollow(folders.resolve(path)), f"the model at {printable(path)}")


def load_single_file(file: Path, config: str) -> Any:
    """The stock pipeline with the weights in `file`, in fp32; the folder `config` has all else."""
    return folders.load_single_file(file, folders.resolve(config, weights=False))


def recognised(tensors: Mapping[str, Tensor]) -> list[str]:
    """The families that an adapter file with these tensors may be for."""
    modules = {name: FAMILIES.module(name) for name in FAMILIES.names()}
    found = {name: module for name, module in modules.items() if module.recognises(tensors)}
    return [name for name, module in found.items() if not hasattr(module, "fits") or module.fits(tensors)]


def folder_of(path: str) -> Path:
    """The local folder of the model at `path`."""
    return folders.resolve(path)


def _around(components: dict[str, Any], what: str) -> Names:
    for name in FAMILIES.names():
        found: Names | None = FAMILIES.module(name).around(components)
        if found is not None:
            return found
    raise InputError(f"{what} is no stock pipeline of a family that is known here: {', '.join(FAMILIES.names())}.")


def validate_settings(values: dict[str, Any], *, where: str = "model") -> Settings:
    """The settings class of `values["family"]`, checked."""
    name = values.get("family", DEFAULT)
    return validate(FAMILIES.module(name, where=f"{where}.family").Settings, values, where=where, name=f"family {name}")
