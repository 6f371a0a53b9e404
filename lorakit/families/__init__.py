"""Floor 2: model families, one file each. What differs between models is here and nowhere else.

A family's module defines `Settings`, `load(settings) -> Family`, `describe(settings) -> Description` (from its
configurations and tokenizers alone) and `tiny() -> Family` (small, random weights: it gets every family test).
"""

from typing import Any

from lorakit.core.registry import Registry
from lorakit.core.settings import Settings, validate
from lorakit.families.protocol import Description, Family

DEFAULT = "sd"  # where none is named; the embedded base is of it too
FAMILIES = Registry("lorakit.families", "family", frozenset({"protocol", "folders", "emphasis"}))


def load(name: str, path: str, **settings: Any) -> Family:
    """The family `name` with the weights at `path` (a diffusers folder, or "embedded").

    Raises InputError for an unknown name or setting and for a folder that lacks a component.
    """
    return load_settings(validate_settings({"family": name, "path": path, **settings}))


def load_settings(settings: Settings) -> Family:
    return FAMILIES.module(settings.family).load(settings)  # type: ignore[attr-defined]


def describe_settings(settings: Settings) -> Description:
    return FAMILIES.module(settings.family).describe(settings)  # type: ignore[attr-defined]


def describe(name: str, path: str, **settings: Any) -> Description:
    """What the data side needs to know of a model, without its weights."""
    return describe_settings(validate_settings({"family": name, "path": path, **settings}))


def validate_settings(values: dict[str, Any], *, where: str = "model") -> Settings:
    """The settings class of `values["family"]`, checked."""
    name = values.get("family", DEFAULT)
    return validate(FAMILIES.module(name, where=f"{where}.family").Settings, values, where=where, name=f"family {name}")
