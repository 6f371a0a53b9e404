import sys

import pytest

from lorakit.core.errors import InputError
from lorakit.core.registry import Registry


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """A package of three kinds on the path; importing `broken` fails."""
    package = tmp_path / "planted_kinds"
    (package / "nested").mkdir(parents=True)
    (package / "nested" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "lora.py").write_text("Settings = 'of lora'")
    (package / "broken.py").write_text("raise RuntimeError('imported')")
    (package / "shared.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield Registry("planted_kinds", "adapter kind", frozenset({"shared"}))
    for name in [name for name in sys.modules if name.startswith("planted_kinds")]:
        del sys.modules[name]


def test_a_file_is_a_kind_and_listing_imports_none(kinds):
    assert kinds.names() == ["broken", "lora"]
    assert "planted_kinds.lora" not in sys.modules


def test_only_the_chosen_one_is_imported(kinds):
    assert kinds.module("lora").Settings == "of lora"
    assert "planted_kinds.broken" not in sys.modules


@pytest.mark.parametrize("kind", ["lroa", "shared", "nested", "os.path", "..lora", ""])
def test_an_unknown_kind_is_the_users_mistake(kinds, kind):
    with pytest.raises(InputError) as caught:
        kinds.module(kind, where="adapter.kind")
    (problem,) = caught.value.problems
    assert problem.startswith(f"adapter.kind = {kind!r} is no adapter kind.")
    assert "lora" in problem
