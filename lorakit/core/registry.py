"""Kinds found because their file lies in a folder: `lorakit/adapters/lora.py` is the adapter kind `lora`.

A kind's module defines `Settings`; the rest of what it must define is its package's protocol. Nothing is imported but
the module that was asked for.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType

from lorakit.core.errors import InputError
from lorakit.core.settings import did_you_mean


@dataclass(frozen=True)
class Registry:
    """The kinds in `package`; `shared` names its modules that are no kind; `noun` is the word in messages."""

    package: str
    noun: str
    shared: frozenset[str] = field(default_factory=frozenset)

    def names(self) -> list[str]:
        """All kinds, sorted, without importing them."""
        folder = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(folder) if not m.ispkg and m.name not in self.shared)

    def module(self, kind: str, *, where: str = "") -> ModuleType:
        """The module of `kind`; InputError names the key `where` and what there is."""
        names = self.names()
        if kind not in names:
            key = f"{where} = " if where else ""
            raise InputError(f"{key}{kind!r} is no {self.noun}.{did_you_mean(str(kind), names)}")
        return importlib.import_module(f"{self.package}.{kind}")
