"""The page's table is what was measured, and a mask covers the subject and no more."""

import json
from pathlib import Path

import numpy as np
import preservation
import pytest
from PIL import Image

from lorakit.core.embedded import embedded


def test_a_row_for_each_way_that_is_done(tmp_path: Path) -> None:
    shares = {"subject": 0.5, "backgrounds": 1.0, "old": 0.98, "traces": 0.02}
    measured = {**shares, "drift": 0.0795, "drift_blank": 0.0052}
    (tmp_path / "base.json").write_text(json.dumps({"seconds": 0.0, **measured}))
    (tmp_path / "blank_prompt.json").write_text(json.dumps({"seconds": 121.1, **measured}))
    found = preservation.table(tmp_path).splitlines()
    assert len(found) == 4 and found[3] == "| blank prompt | 50% | 100% | 98% | 2% | 79.5 | 5.2 | 121 |"
    page = preservation.PAGE.read_text(encoding="utf-8")
    assert "\n\nnew\n\n" in preservation.into_page(page, "new")


@pytest.mark.parametrize("name", preservation.WAYS)
def test_each_way_is_a_recipe_with_as_many_of_the_subject(name: str, tmp_path: Path) -> None:
    recipe = preservation.recipe(name, tmp_path, steps=3)
    assert recipe.run.batch_size == 8 * len(recipe.data.sources)
    if name == "masked_prior":
        mask = np.asarray(Image.open(tmp_path / "masks" / "zorp-01.png"))
        with Image.open(embedded("mascot") / "zorp-01.png") as picture:
            assert mask.shape == (picture.height, picture.width)
        assert 0.05 < (mask > 0).mean() < 0.6 and not mask[0].any()
