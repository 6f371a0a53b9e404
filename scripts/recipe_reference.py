"""Writes docs/recipe.md: every setting of a recipe, from the settings classes themselves.

python scripts/recipe_reference.py
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lorakit.core.settings import descriptions, is_neutral
from lorakit.recipe import CHOSEN, FIXED

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "recipe.md"
HEAD = """# Every setting of a recipe

Made by `scripts/recipe_reference.py` from the settings classes; a test holds it to them. A recipe is a
TOML file; what is left out has the default shown. On the command line the same names: `run.steps=500`,
`data.sources.0.path=photos`. *Neutral* settings change no number of the training, and a resumed run may have them
otherwise; `tests/test_options.py` tries each.
"""


def reference() -> str:
    """The page's text."""
    parts, seen = [HEAD], set[str]()
    for section, (registry, chooser, default) in CHOSEN.items():
        for kind in sorted(registry.names(), key=lambda name: name != default):
            note = f'`{chooser} = "{kind}"`' + (", the default" if kind == default else "")
            parts += [f"## [{section}]: {note}\n", *_tables(registry.module(kind).Settings, section, seen)]
    for section, settings in FIXED.items():
        parts += [f"## [{section}]\n", *_tables(settings, section, seen)]
    return "\n".join(parts)


def _tables(settings: type[BaseModel], key: str, seen: set[str]) -> Iterator[str]:
    """The table of one class, then those of the classes within it that are not among the `seen` ones."""
    yield f"`{_file(settings)}`\n"
    yield "| key | value | default | what it does |\n|---|---|---|---|"
    inner: dict[str, type[BaseModel]] = {}
    described = descriptions(settings)
    own, shared = settings.__annotations__, settings.__mro__[1]
    told = f"{shared.__module__}.{shared.__name__}" in seen
    seen.add(f"{shared.__module__}.{shared.__name__}")
    # what a class inherits comes after what is its own
    for name, field in sorted(settings.model_fields.items(), key=lambda item: item[0] not in own):
        if told and name not in own:
            continue
        nested = list(_models(field.annotation))
        many = get_origin(field.annotation) is list
        for model in nested:
            label = f"{key}.{name}" + (f" (kind = {_kind(model)})" if len(nested) > 1 else "")
            inner[f"[[{label}]]" if many else f"[{label}]"] = model
        what = described[name].replace("|", "\\|")
        what += " *Neutral.*" if is_neutral(settings, name) else ""
        value = "table" if nested and not many else "tables" if nested else _type(field.annotation)
        yield f"| `{name}` | {value} | {_default(field, nested)} | {what} |"
    yield ""
    if told and shared.model_fields:
        fields = settings.model_fields
        names = (f"`{name}`" + (" (**needed**)" if fields[name].is_required() else "") for name in shared.model_fields)
        yield f"And the settings of `{_file(shared)}`, as above: {', '.join(names)}.\n"
    for label, model in inner.items():
        yield f"### {label}\n"
        if label in seen:
            yield "As above.\n"
        else:
            seen.add(label)
            yield from _tables(model, label.strip("[]").split(" ")[0], seen)


def _file(settings: type[BaseModel]) -> str:
    return str(Path(inspect.getfile(settings)).relative_to(ROOT))


def _kind(model: type[BaseModel]) -> str:
    return '"' + str(get_args(model.model_fields["kind"].annotation)[0]) + '"'


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _type(annotation: Any) -> str:
    """A type in words for people who write TOML."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " \\| ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin is Annotated:
        return _type(parts[0])
    if origin in (list, tuple):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"table of {_type(parts[1])}"
    return {int: "whole number", float: "number", str: "text", bool: "true \\| false"}.get(annotation, str(annotation))


def _default(field: Any, nested: list[type[BaseModel]]) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None or nested:
        return ""
    return (
        f"`{str(value).lower() if isinstance(value, bool) else repr(value) if not isinstance(value, str) else value}`"
        if value != ""
        else '`""`'
    )


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
