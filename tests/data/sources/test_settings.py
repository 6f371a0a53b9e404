from typing import Any

import pytest

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.data.sources import SourceSettings


def problems(**values: Any) -> list[str]:
    with pytest.raises(InputError) as error:
        validate(SourceSettings, {"path": "p", **values}, where="data.sources.0", name="a source")
    return error.value.problems


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"repeats": 2, "samples_per_epoch": 3}, ["samples_per_epoch: repeats and samples_per_epoch are both given"]),
        ({"start_step": 5, "end_step": 5}, ["end_step: it must be greater than start_step, 5"]),
        ({"repeats": 0, "weight": -1.0, "start_step": -1}, ["repeats", "weight", "start_step"]),
        ({"repeats": "2", "weight": float("nan")}, ["repeats", "weight"]),
        ({"samples_per_epoch": 0, "end_step": 0}, ["samples_per_epoch", "end_step"]),
        (
            {"role": "validation", "repeats": 2, "samples_per_epoch": 5, "start_step": 1, "end_step": 2},
            ["repeats: a validation source is not trained on", "samples_per_epoch", "start_step", "end_step"],
        ),
        ({"role": "regularisation"}, ["role"]),
        ({"mask": "alpha", "mask_path": "m"}, ['mask_path: mask = "alpha" leaves it unused']),
        ({"default_caption": "a\x1eb"}, ["default_caption: it holds characters"]),
        ({"colum": "x"}, ["colum is not a setting of a source"]),
        ({"caption_dropout": 1.5}, ["caption_dropout"]),
    ],
)
def test_nonsense_is_refused_by_its_key(values: dict[str, Any], keys: list[str]) -> None:
    found = problems(**values)
    assert len(found) == len(keys)
    assert all(text.startswith(f"data.sources.0.{key}") for text, key in zip(found, keys)), found


def test_what_makes_sense_passes() -> None:
    for values in (
        {"repeats": 1, "samples_per_epoch": 3, "start_step": 5, "end_step": 6},
        {"role": "validation", "repeats": 1, "weight": 1.0},
        {"role": "regularization", "samples_per_epoch": 7, "mask_path": "m"},
    ):
        assert validate(SourceSettings, {"path": "p", **values}, where="s", name="s").path == "p"
