"""docs/families.md is what the registered families are now."""

import families_reference

from lorakit.families import FAMILIES


def test_the_page_is_current() -> None:
    page = families_reference.reference()
    assert families_reference.FILE.read_text(encoding="utf-8") == page, "run python scripts/families_reference.py"
    assert all(page.count(f"| `{name}` |") == 3 for name in FAMILIES.names())


def test_every_family_has_a_recipe() -> None:
    assert all(families_reference._recipes(name) for name in FAMILIES.names())
