from typing import Annotated, Literal

import pytest
from pydantic import Field

from lorakit.core.errors import InputError
from lorakit.core.settings import Settings, descriptions, did_you_mean, validate


class Inner(Settings):
    gamma: float = 5.0
    """A number within a section."""


class Plain(Settings):
    kind: Literal["none"] = "none"


class Snr(Settings):
    kind: Literal["min_snr"]
    gamma: float = Field(5.0, gt=0)


class Outer(Settings):
    kind: str = "lora"
    rank: int = 16
    """Width of the adapter."""
    lr: float
    inner: Inner = Inner()
    optional: Inner | None = None
    several: list[Inner] = []
    weighting: Annotated[Plain | Snr, Field(discriminator="kind")] = Plain()
    shape: Literal["constant", "cosine"] = "cosine"
    pair: tuple[float, float] = (0.9, 0.99)
    share: bool | Annotated[float, Field(le=1)] = False
    sizes: int | list[int] = 512


def problems(values):
    with pytest.raises(InputError) as caught:
        validate(Outer, values, where="adapter", name="lora")
    return caught.value.problems


def test_good_values_become_settings():
    settings = validate(Outer, {"rank": 4, "lr": 1}, where="adapter", name="lora")
    assert (settings.rank, settings.lr, settings.inner.gamma) == (4, 1.0, 5.0)


def test_all_problems_come_at_once_each_with_its_key():
    found = problems({"rnak": 4, "rank": "4", "inner": {"gama": 1.0}})
    assert len(found) == 4
    assert "adapter.rnak is not a setting of lora. Did you mean rank?" in found
    assert "adapter.lr is missing: lora needs it." in found
    assert any(p.startswith("adapter.rank = '4': ") for p in found)
    assert any(p.startswith("adapter.inner.gama is not a setting") and "Did you mean gamma?" in p for p in found)


@pytest.mark.parametrize("rank", ["16", 16.5, True, None, [16]])
def test_nothing_is_converted_silently(rank):
    (problem,) = problems({"rank": rank, "lr": 0.1})
    assert problem.startswith("adapter.rank = ")


def test_a_whole_number_may_stand_for_a_float_but_no_text():
    assert validate(Outer, {"lr": 1}, where="adapter", name="lora").lr == 1.0
    (problem,) = problems({"lr": "1e-4"})
    assert problem.startswith("adapter.lr = '1e-4'")


def test_optional_and_repeated_sections_suggest_too():
    found = problems({"lr": 0.1, "optional": {"gama": 1.0}, "several": [{"gama": 1.0}]})
    assert len(found) == 2
    assert all("Did you mean gamma?" in problem for problem in found), found


@pytest.mark.parametrize(
    ("weighting", "problem"),
    [
        ({"kind": "min_snr", "gama": 1.0}, "adapter.weighting.gama is not a setting of lora. Did you mean gamma?"),
        ({"kind": "min_snr", "gamma": 0}, "adapter.weighting.gamma = 0: input should be greater than 0."),
        ({"kind": "minsnr"}, "adapter.weighting.kind = 'minsnr' is not known. Did you mean min_snr?"),
        ({"gamma": 1.0}, "adapter.weighting.kind is missing: it is one of none, min_snr."),
    ],
)
def test_a_section_whose_kind_chooses_its_settings(weighting, problem):
    """The key is the one that stands in the file, without marks of the library that checks it."""
    assert problems({"lr": 0.1, "weighting": weighting}) == [problem]


def test_a_word_out_of_a_list_is_suggested():
    (problem,) = problems({"lr": 0.1, "shape": "cosin"})
    assert problem == "adapter.shape = 'cosin': input should be 'constant' or 'cosine'. Did you mean cosine?"


def test_a_list_of_a_recipe_may_become_a_pair():
    assert validate(Outer, {"lr": 0.1, "pair": [0.5, 0.6]}, where="adapter", name="lora").pair == (0.5, 0.6)
    assert len(problems({"lr": 0.1, "pair": [0.5]})) == 1


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_no_number_is_no_number(lr):
    (problem,) = problems({"lr": lr})
    assert problem.startswith("adapter.lr = ")


def test_without_a_section_the_key_stands_alone():
    with pytest.raises(InputError) as caught:
        validate(Outer, {"lr": 0.1, "rnak": 1}, where="", name="a recipe")
    assert caught.value.problems == ["rnak is not a setting of a recipe. Did you mean rank?"]


def test_a_value_that_may_be_of_several_types_is_one_problem():
    assert problems({"lr": 0.1, "share": 1.5, "sizes": [1, "2"]}) == [
        "adapter.share = 1.5: input should be a valid boolean, or input should be less than or equal to 1.",
        "adapter.sizes = [1, '2']: input should be a valid integer.",
        "adapter.sizes.1 = '2': input should be a valid integer.",
    ]


def test_settings_cannot_be_changed():
    settings = validate(Outer, {"lr": 0.1}, where="adapter", name="lora")
    with pytest.raises(Exception, match="frozen"):
        settings.rank = 8


def test_a_docstring_under_a_field_is_its_description():
    assert descriptions(Outer)["rank"] == "Width of the adapter."


def test_did_you_mean():
    assert did_you_mean("cosin", ["constant", "cosine"]) == " Did you mean cosine?"
    assert did_you_mean("qqq", ["constant", "cosine"]) == " There is: constant, cosine."
    assert did_you_mean("qqq", []) == ""
