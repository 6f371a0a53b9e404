"""The recipe: a TOML file, its command-line overrides, and the settings that they become.

What a section may hold is defined by the settings class beside the code that it configures; here they are only put
together. A recipe knows its defaults, so `to_toml` writes every one of them out.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters import ADAPTERS
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Settings, did_you_mean, is_neutral, validate
from lorakit.data.dataset import DataSettings
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.export.dialects import DIALECTS
from lorakit.families import DEFAULT, FAMILIES
from lorakit.optimizers import OPTIMIZERS
from lorakit.sampling.pictures import SampleSettings
from lorakit.training.loop import RunSettings

# section: (registry, key that chooses, kind where it is not given)
CHOSEN = {
    "model": (FAMILIES, "family", DEFAULT),
    "adapter": (ADAPTERS, "kind", "lora"),
    "objective": (OBJECTIVES, "kind", "denoising"),
    "optimizer": (OPTIMIZERS, "kind", "adamw"),
}
FIXED: dict[str, type[Settings]] = {"data": DataSettings, "run": RunSettings, "sample": SampleSettings}
DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class Recipe:
    """A whole, checked recipe; each part is the settings class of what it configures."""

    model: Any
    adapter: Any
    data: DataSettings
    objective: Any
    optimizer: Any
    run: RunSettings
    sample: SampleSettings

    def to_dict(self, *, paths: bool = True) -> dict[str, Any]:
        """Every setting, defaults included; None (which TOML cannot say) is left out.

        Without `paths`, for what is passed on, each is cut to its last name.
        """
        values = {
            name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in self.__dataclass_fields__
        }
        if not paths:
            for _, table, key in _path_settings(values):
                table[key] = Path(table[key]).name
        return values

    def to_toml(self, *, paths: bool = True) -> str:
        """The recipe's file."""
        import tomli_w

        return tomli_w.dumps(self.to_dict(paths=paths))


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the TOML file `path`, changed by `overrides` like "run.steps=500".

    Relative paths are relative to the file, in overrides to the current folder. Raises InputError with all that is
    wrong at once.
    """
    file = Path(path)
    shown = printable(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{shown} does not exist: give the path of a recipe (TOML).") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error.strerror}): give the path of a recipe (TOML).") from None
    except UnicodeDecodeError:
        raise InputError(f"{shown} is not UTF-8 text: a recipe is a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{shown} is not valid TOML: {error}.") from None
    anchor_paths(values, file.resolve().parent)
    for override in overrides:
        apply_override(values, override)
    if isinstance(values.get("run", {}), dict):
        values.setdefault("run", {}).setdefault("output", str(Path.cwd() / "runs" / file.stem))
    return build(values)


def build(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a nested dictionary. Raises InputError with all that is wrong at once."""
    problems: list[str] = []
    known = list(Recipe.__dataclass_fields__)
    problems += [f"{key} is not a section of a recipe.{did_you_mean(key, known)}" for key in values if key not in known]
    problems += [f"{key} is empty: name a path." for key, table, name in _path_settings(values) if not table[name]]
    parts: dict[str, Any] = {}
    for section in known:
        given = values.get(section, {})
        if not isinstance(given, dict):
            problems.append(f"{section} = {given!r}: a section is a table, written [{section}].")
            continue
        try:
            parts[section] = _section(section, given)
        except InputError as error:
            problems += error.problems
    if "run" in parts and parts["run"].steps is not None and parts["run"].epochs is not None:
        problems.append("run.steps and run.epochs are both given: keep one of them.")
    if "data" in parts and not parts["data"].sources:
        problems.append('data.sources is missing: name a folder of pictures, [[data.sources]] path = "…".')
    if "run" in parts and parts["run"].format is not None:
        problems += _format_problems(parts["run"].format)
    if problems:
        raise InputError(problems)
    if parts["run"].steps is None and parts["run"].epochs is None:
        parts["run"] = parts["run"].model_copy(update={"steps": DEFAULT_STEPS})
    return Recipe(**parts)


def _format_problems(name: str) -> list[str]:
    """Why `run.format` cannot be this one."""
    files = [dialect for dialect in DIALECTS.names() if not DIALECTS.module(dialect).FOLDER]
    if name in files:
        return []
    if name in DIALECTS.names():
        return [
            f"run.format = {name!r} is a folder: leave it out, and use lorakit export RUN --format {name} afterwards."
        ]
    return [f"run.format = {name!r} is no adapter format.{did_you_mean(name, files)}"]


def _section(section: str, given: dict[str, Any]) -> Settings:
    if section in FIXED:
        return validate(FIXED[section], given, where=section, name=f"[{section}]")
    registry, chooser, default = CHOSEN[section]
    kind = given.get(chooser, default)
    settings = registry.module(kind, where=f"{section}.{chooser}").Settings
    return validate(settings, {chooser: kind, **given}, where=section, name=str(kind))


# -- overrides and paths ------------------------------------------------------------------------------------------


def apply_override(values: dict[str, Any], override: str) -> None:
    """Puts `section.key=value` into `values`; the value is TOML, else text. A number names a list's entry."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise InputError(f"{printable(override)!r} is no override: write section.key=value, like run.steps=500.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = values
    for i, part in enumerate(path[:-1]):
        following: Any = [] if path[i + 1].isdigit() else {}
        node = _entry(node, part, override, following)
    if isinstance(node, list):
        _entry(node, path[-1], override, None)
        node[int(path[-1])] = value
    elif isinstance(node, dict):
        node[path[-1]] = value
    else:
        raise InputError(f"{printable(override)}: {'.'.join(path[:-1])} holds no further keys.")
    anchor_paths(values, Path.cwd())


def _entry(node: Any, part: str, override: str, new: Any) -> Any:
    """The entry `part` of a table or list, made as `new` where it is the next one missing."""
    if isinstance(node, list) and part.isdigit() and int(part) <= len(node):
        if int(part) == len(node):
            node.append(new)
        return node[int(part)]
    if isinstance(node, dict):
        return node.setdefault(part, new)
    raise InputError(f"{printable(override)}: there is no entry {part} to change.")


def anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a recipe's values absolute, from `folder`; absolute ones stay."""
    for _, table, key in _path_settings(values):
        path = table[key]
        if not path or path.startswith("hf://"):  # what is empty is refused, and no name of the folder
            continue
        # "embedded" and hub names are no paths: what looks like one is anchored, and what exists there
        named = table is values.get("model") and not path.startswith((".", "~")) and path.count("/") <= 1
        if not named or (path != "embedded" and (path.count("/") != 1 or (folder / path).exists())):
            table[key] = str(folder / Path(path).expanduser())


def _path_settings(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], str]]:
    """Where a recipe's values hold a path: the dotted keys, tables and keys that are there and hold text."""
    data = values.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    places = [("model", values.get("model"), key) for key in ("path", "config", "vae")]
    places += [("data", data, "cache"), *(("run", values.get("run"), key) for key in ("output", "compile_cache"))]
    places.append(("adapter", values.get("adapter"), "init_from"))
    places += [("sample", values.get("sample"), key) for key in ("image", "mask")]
    places += [
        (f"data.sources.{i}", source, key)
        for i, source in enumerate(sources if isinstance(sources, list) else [])
        for key in ("path", "mask_path", "input_path")
    ]
    return [
        (f"{where}.{key}", table, key)
        for where, table, key in places
        if isinstance(table, dict) and isinstance(table.get(key), str)
    ]


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Every setting below `value` as JSON by its dotted key."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        items = enumerate(value)
    else:
        return {key: json.dumps(value)}
    return {k: v for name, inner in items for k, v in flat(inner, f"{key}.{name}" if key else str(name)).items()}


def known_keys(values: Mapping[str, Any]) -> list[str]:
    """The dotted keys of all settings in a recipe's dictionary, and of the tables that they stand in."""
    keys = [key.split(".") for key in flat(values)]
    return sorted({".".join(parts[: i + 1]) for parts in keys for i in range(len(parts))})


def neutral_keys(recipe: Recipe) -> set[str]:
    """The dotted keys of the settings in `recipe` that change no number of a training."""
    return {key for key in flat(recipe.to_dict()) if _is_neutral(recipe, key.split("."))}


def _is_neutral(node: Any, path: Sequence[str]) -> bool:
    for part in path:
        if isinstance(node, Settings) and is_neutral(type(node), part):
            return True
        if isinstance(node, dict):  # its keys are the user's own, and may hold dots
            break
        node = node[int(part)] if isinstance(node, (list, tuple)) else getattr(node, part)
    return False


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two recipes' dictionaries."""
    old, new = flat(before), flat(after)
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
