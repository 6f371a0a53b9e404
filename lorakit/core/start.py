"""What a process of our own leaves out while it starts, most of which is importing libraries."""

import gc
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_RARELY = 1_000_000  # objects more than when it last looked


def collect_rarely() -> None:
    """Lets Python look for cycles to be freed hardly ever, until `collect_as_ever`: what libraries make when they are
    imported stays, each look at it is in vain, and all of them are a tenth of a start.
    """
    gc.set_threshold(_RARELY)


def collect_as_ever() -> None:
    """If it did rarely, Python looks as often as by itself from here on, at what is made from here on; at the rest when
    memory is to be had again (`memory.let_go`)."""
    if gc.get_threshold()[0] == _RARELY:
        gc.freeze()
        gc.set_threshold(700, 10, 10)


def import_later(name: str) -> None:
    """Lets `import name` cost nothing until something of the package is asked for.

    The standard library's LazyLoader imports at the second `import` already.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None:
        sys.modules[name] = _Later(spec)


class _Later(ModuleType):
    def __init__(self, spec: Any) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin  # what `inspect` asks of every module there is

    def __getattr__(self, attribute: str) -> Any:  # of all that is not here: `__path__` too, when a submodule is wanted
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
        package = importlib.import_module(name)
        self.__dict__.update({key: value for key, value in vars(package).items() if key != "__spec__"})
        return getattr(package, attribute)


def list_models_once() -> None:
    """Spares transformers the second look through the files of all its models.

    It takes one for itself and one for `transformers.models`: what remembers the first has room for 128 folders, and
    there are more than 500.
    """
    if "transformers.models" not in sys.modules:
        sys.meta_path.insert(0, _Listed())


class _Listed:
    """Finds no module, and is there when `transformers.models` is about to be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "transformers.models":
            return
        sys.meta_path.remove(self)
        utils: Any = sys.modules["transformers.utils.import_utils"]
        listed = getattr(utils, "create_import_structure_from_path", None)
        if listed is None:  # another transformers
            return
        folder = Path(utils.__file__).parents[1] / "models"
        own, found = (folder, folder / "__init__.py"), listed(folder)  # is remembered: it was the last
        utils.create_import_structure_from_path = lambda asked: found if Path(asked) in own else listed(asked)
