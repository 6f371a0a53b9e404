"""A package that is to be imported later is one that nobody can tell from another; looking for garbage is put off and
taken up again. In processes of their own: both last."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "import marks\nmarks.append(__name__)\nfrom laterpack import part\nvalue = 7\n"
LATER = """
import importlib.util, inspect, sys
sys.path.insert(0, sys.argv[1])
import marks
from lorakit.core.start import import_later

import_later("laterpack")
import_later("no_such_package")
assert "no_such_package" not in sys.modules
import laterpack
import laterpack as again
assert importlib.util.find_spec("laterpack").origin == laterpack.__file__
inspect.getmodule(inspect.currentframe())  # looks at all modules
assert marks.made == [], "imported too early"
{first}
assert marks.made == ["laterpack"] and again.value == 7
assert sys.modules["laterpack"].value == 7 and sys.modules["laterpack"].part is sys.modules["laterpack.part"]
try:
    laterpack.nothing
except AttributeError:
    pass
else:
    raise AssertionError
"""
RARELY = """
import gc
before = gc.get_threshold()
from lorakit.core.start import collect_as_ever, collect_rarely

gc.set_threshold(5, 5, 5)
collect_as_ever()
assert gc.get_threshold() == (5, 5, 5) and gc.get_freeze_count() == 0, "a program that uses lorakit has its own way"
collect_rarely()
assert gc.get_threshold()[0] > 100 * before[0]
collect_as_ever()
assert gc.get_threshold() == before and gc.get_freeze_count()
"""
LISTED = """
import builtins, json, sys
from lorakit.core.start import list_models_once

looked, real = [], builtins.open

def noting(file, *arguments, **how):
    if "/transformers/models/" in str(file) and str(file).endswith(".py"):
        looked.append(file)
    return real(file, *arguments, **how)

builtins.open = noting
if sys.argv[1] == "once":
    list_models_once()
import transformers
from transformers import CLIPTextConfig
structure = transformers.models._import_structure
print(json.dumps([len(looked), len(set(looked)), {key: sorted(names) for key, names in sorted(structure.items())}]))
"""

MODEL = """
import gc, weakref
from lorakit.core.start import collect_rarely

collect_rarely()
from lorakit import families

from lorakit.core.memory import let_go

family = families.load_settings(families.validate_settings({"family": "sd", "path": "embedded"}))
assert gc.get_threshold()[0] == 700 and gc.get_freeze_count()
parts = [weakref.ref(part) for part in (family, *family.components.values(), *family.components["unet"].parameters())]
del family
let_go()
assert not any(part() is not None for part in parts)
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "first", ["assert laterpack.value == 7", "import laterpack.part", "from laterpack import part"]
)
def test_a_package_is_imported_when_something_of_it_is_wanted(first: str, tmp_path: Path) -> None:
    (tmp_path / "marks.py").write_text("made = []\nappend = made.append\n")
    (tmp_path / "laterpack").mkdir()
    (tmp_path / "laterpack" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "laterpack" / "part.py").write_text("")
    run(LATER.format(first=first), str(tmp_path))


def test_cycles_are_looked_for_rarely_and_then_as_ever() -> None:
    run(RARELY)


def test_a_model_goes_when_nobody_wants_it_any_more() -> None:
    """Else `run.fit` would try its next settings beside the last, and a base that drew class pictures would stay."""
    run(MODEL)


def test_transformers_lists_its_models_once_and_finds_the_same() -> None:
    (looked, files, found), (looked_twice, _, stock) = (json.loads(run(LISTED, how)) for how in ("once", "as ever"))
    assert found == stock
    assert looked < 1.1 * files, "a few models list themselves once more"
    assert looked_twice > 1.9 * files, "it looks once by itself: there is nothing to spare any more"
