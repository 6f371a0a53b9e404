"""The base of all settings classes, and their messages.

A settings class stands beside the class or function that it configures. It is strict (no text for numbers), refuses
unknown keys, and describes every field.
"""

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit.core.errors import InputError


class Settings(BaseModel):
    """Strict and frozen; every field carries a description (`Field(default, description=…)`)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


S = TypeVar("S", bound=Settings)


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
        return settings.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise InputError([_explain(settings, e, where=where, name=name) for e in error.errors()]) from None


def _explain(settings: type[Settings], error: Any, *, where: str, name: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join([where, *path]) if where else ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{key} is not a setting of {name}.{did_you_mean(path[-1], _fields(settings, path[:-1]))}"
    if error["type"] == "missing":
        return f"{key} is missing: {name} needs it."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}"
    return f"{key} = {error['input']!r}: {message[0].lower()}{message[1:]}."


def _fields(settings: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields that the settings nested at `path` have."""
    for part in path:
        field = settings.model_fields.get(part)
        nested = field.annotation if field else None
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            settings = nested
        else:
            return []
    return list(settings.model_fields)
