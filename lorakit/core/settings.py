"""The base of all settings classes, and their messages.

A settings class stands beside the class or function that it configures. It is strict (no text for numbers), refuses
unknown keys, and describes every field.
"""

import ast
import difflib
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit.core.errors import InputError


class Settings(BaseModel):
    """Strict and frozen; every field carries a description, the docstring under it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)
T = TypeVar("T")

Neutral = Annotated[T, "neutral"]
"""The type of a field that changes no number of a training, so that a resumed run may have it otherwise. All other
fields are numeric: each changes a number. A test walks all of both (`tests/test_options.py`)."""


def is_neutral(settings: type[BaseModel], field: str) -> bool:
    """Whether the field changes no number of a training."""
    return "neutral" in settings.model_fields[field].metadata


def descriptions(settings: type[BaseModel]) -> dict[str, str]:
    """What stands under the fields, in one line each. Read when it is asked for: pydantic's own way costs each start an
    eighth of a second.
    """
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(body, ast.ClassDef)
            for field, text in itertools.pairwise(body.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(said))):
                        found[name] = " ".join(said.split())
    return found


def did_you_mean(word: str, known: list[str]) -> str:
    """` Did you mean x?` where a known word is near, else the list of what there is."""
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f" Did you mean {near[0]}?"
    return f" There is: {', '.join(known)}." if known else ""


def validate(settings: type[S], values: dict[str, Any], *, where: str, name: str) -> S:
    """`values` as an instance of `settings`.

    `where` is the section's dotted key and `name` what its settings are called in messages. Raises InputError with
    every wrong key at once.
    """
    try:
        # as JSON, since TOML like JSON has one kind of list, which strict validation takes for tuples only there
        return settings.model_validate_json(json.dumps(_with_kinds(settings, values), default=str))
    except ValidationError as error:
        found: dict[str, list[str]] = {}  # a value that may be of several types is wrong for each of them
        for one in error.errors():
            key, what = _explain(settings, one, where=where, name=name)
            found.setdefault(key, []).append(what)
        raise InputError(
            [key + ", or ".join([*(w.rstrip(".") for w in o), w]) for key, (*o, w) in found.items()]
        ) from None


def _with_kinds(settings: type[Settings], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the default's kind in tables that name none and hold settings of that kind alone."""
    named = {}
    for name, field in settings.model_fields.items():
        table, chooser, usual = values.get(name), field.discriminator, field.default
        if not isinstance(table, dict) or not isinstance(chooser, str) or not isinstance(usual, Settings):
            continue
        if chooser not in table and table.keys() <= type(usual).model_fields.keys():
            named[name] = {chooser: getattr(usual, chooser), **table}
    return {**values, **named}


def _explain(settings: type[Settings], error: Any, *, where: str, name: str) -> tuple[str, str]:
    """What is wrong, in two: where and with which value, and why."""
    path, models = _follow(settings, error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind.startswith("union_tag"):
        path.append(context["discriminator"].strip("'"))
    key = ".".join([where, *path]) if where else ".".join(path)
    if kind == "extra_forbidden":
        known = sorted({field for model in models for field in model.model_fields})
        return f"{key} is not a setting of {name}.", did_you_mean(path[-1], known)
    if kind == "union_tag_not_found":
        tables = [inner for model in models for inner in _models(model.model_fields[path[-2]].annotation)]
        kinds = [str(word) for table in tables for word in get_args(table.model_fields[path[-1]].annotation)]
        return f"{key} is missing: it is one of {', '.join(kinds)}.", ""
    if kind == "missing":
        return f"{key} is missing: {name} needs it.", ""
    if kind == "union_tag_invalid":
        known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
        return f"{key} = {context['tag']!r} is not known.", did_you_mean(context["tag"], known)
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("value_error", "assertion_error"):
        return (f"{key}: " if key else ""), message
    hint = ""
    if kind == "literal_error" and isinstance(error["input"], str):
        near = difflib.get_close_matches(error["input"], re.findall(r"'([^']*)'", context["expected"]), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key} = {error['input']!r}: ", f"{message[0].lower()}{message[1:]}.{hint}"


def _follow(settings: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The keys in an error's `loc`, without pydantic's marks for unions, and the classes that the last table may be."""
    path: list[str] = []
    models: list[type[BaseModel]] = [settings]
    table = models
    plain: list[Any] = []  # types without settings that the last value may have
    for part in loc:
        chosen = [model for model in models if len(models) > 1 and part in _marks(model)]
        if chosen or (len(plain) > 1 and isinstance(part, str)):
            models, plain = chosen, []
            continue
        path.append(str(part))
        if isinstance(part, str):
            table = models
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [nested for field in fields for nested in _models(field.annotation)]
            unions = [field.annotation for field in fields if get_origin(field.annotation) in (Union, UnionType)]
            plain = [kind for union in unions for kind in get_args(union) if kind is not type(None) and not models]
    return path, table


def _marks(model: type[BaseModel]) -> set[str]:
    """What pydantic calls a member of a union by: its class, or the value of the field that tells members apart."""
    values = [value for field in model.model_fields.values() for value in get_args(field.annotation)]
    return {model.__name__, *(value for value in values if isinstance(value, str))}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes within an annotation like `Inner | None` or `list[Inner]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
