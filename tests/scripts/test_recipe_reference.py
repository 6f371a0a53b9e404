"""docs/recipe.md is what the settings say now."""

import recipe_reference

from lorakit.data.sources import SourceSettings


def test_the_page_is_current() -> None:
    assert recipe_reference.FILE.read_text(encoding="utf-8") == recipe_reference.reference(), (
        "run python scripts/recipe_reference.py"
    )


def test_every_setting_is_described() -> None:
    page = recipe_reference.reference()
    for name in SourceSettings.model_fields:
        assert f"| `{name}` |" in page
    assert "|  |\n" not in page, "a setting without a description"
