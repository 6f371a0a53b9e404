"""What every registered optimizer offers, and the messages about what it cannot do here."""

import importlib.machinery
import math
import sys
from typing import Any

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.core.settings import descriptions, validate
from lorakit.optimizers import OPTIMIZERS, common
from lorakit.optimizers.schedules import Schedule
from lorakit.optimizers.state import optimizer_state
from tests.optimizers.training import CASES, after

KINDS = OPTIMIZERS.names()
PARTS = ("adapter.lr", "adapter.text_encoder.lr")


def settings(kind: str, **values: Any) -> Any:
    """The settings as a recipe makes them."""
    return validate(OPTIMIZERS.module(kind).Settings, {"kind": kind, **values}, where="optimizer", name=kind)


def problems(kind: str, rates: tuple[float | None, float | None] = (None, None), **values: Any) -> list[str]:
    return settings(kind, **values).problems(dict(zip(PARTS, rates)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizers_module(kind: str) -> None:
    module = OPTIMIZERS.module(kind)
    own = settings(kind)
    assert own.kind == kind and own.full_rate > 0 and own.max_grad_norm == 1
    assert set(descriptions(module.Settings)) == set(module.Settings.model_fields)
    assert module.build.__doc__
    assert problems(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_recipe_is_read_again(kind: str) -> None:
    own = settings(kind)
    written = own.model_dump(mode="json", exclude_none=True)
    assert settings(kind, **{k: v for k, v in written.items() if k != "kind"}) == own


@pytest.mark.parametrize("kind", KINDS)
def test_a_warmup_alone_keeps_the_kind(kind: str) -> None:
    values = {"lr": 1e-3, "schedule": {"warmup": 20}}
    kept = settings(kind, **values).schedule
    assert kept == Schedule(kind="constant" if kind == "schedule_free" else "cosine", warmup=20)


@pytest.mark.parametrize("kind", KINDS)
def test_betas_are_below_one(kind: str) -> None:
    if "betas" in OPTIMIZERS.module(kind).Settings.model_fields:
        with pytest.raises(InputError, match="optimizer.betas"):
            settings(kind, betas=[1.0, 0.999])


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [
        ("adamw8bit", "bitsandbytes", "bnb"),
        ("lion", "bitsandbytes", "bnb"),
        ("lion8bit", "bitsandbytes", "bnb"),
        ("prodigy", "prodigyopt", "prodigy"),
        ("schedule_free", "schedulefree", "schedulefree"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, library: str, extra: str
) -> None:
    assert problems(kind) == []
    real = importlib.machinery.PathFinder.find_spec
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(
        importlib.machinery.PathFinder, "find_spec", lambda name, *rest: None if name == library else real(name, *rest)
    )
    (problem,) = problems(kind)
    assert kind in problem and library in problem and f'pip install "lorakit[{extra}]"' in problem


def test_the_extras_are_those_of_the_package() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for kind in KINDS:
        library = OPTIMIZERS.module(kind).Settings.library
        if library:
            module, extra = library
            (requirement,) = project["optional-dependencies"][extra]
            assert requirement.startswith(module) and requirement in project["optional-dependencies"]["test"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="paging works here")
@pytest.mark.parametrize("kind", ["adamw8bit", "lion", "lion8bit"])
def test_paging_needs_a_gpu(kind: str) -> None:
    (problem,) = problems(kind, paged=True)
    assert "optimizer.paged" in problem and "no GPU" in problem


def test_prodigy_has_one_rate() -> None:
    assert problems("prodigy", (None, 1.0)) == problems("prodigy", (0.5, 0.5)) == []
    (problem,) = problems("prodigy", (None, 5e-5))
    assert problem.startswith("adapter.text_encoder.lr = 5e-05: prodigy finds one rate")
    assert len(problems("prodigy", (0.5, 5e-5))) == 2


def test_adafactor_takes_given_rates_or_its_own() -> None:
    assert problems("adafactor", (None, 5e-5), lr=1e-3) == []
    (problem,) = problems("adafactor", (None, 5e-5))
    assert problem.startswith("adapter.text_encoder.lr: adafactor without optimizer.lr")
    assert problems("adamw", (1e-4, 5e-5)) == []


@pytest.mark.parametrize(
    ("kind", "schedule", "message"),
    [
        ("schedule_free", {"kind": "cosine"}, "schedule.kind = 'cosine' does not go with schedule_free"),
        ("schedule_free", {"floor": 0.1}, "schedule.floor = 0.1 does nothing with kind = 'constant'"),
        ("adafactor", {"kind": "linear"}, "does not go with adafactor's relative steps"),
        ("adafactor", {"warmup": 5}, "schedule.warmup does nothing"),
    ],
)
def test_a_decay_that_does_nothing_is_refused(kind: str, schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(kind, schedule=schedule)
    assert settings(kind, schedule={"kind": "constant"}).schedule == settings(kind).schedule


@pytest.mark.parametrize("case", CASES)
def test_the_state_is_of_the_size_that_it_is_said_to_be(case: str) -> None:
    shapes = {"unet.down": (16, 320), "unet.up": (320, 16), "unet.small": (4, 20)}  # the small one keeps 32 bits
    trained = after(case, 2, shapes=shapes)
    tensors, _ = optimizer_state(trained.optimizer, trained.parameters)
    numbers = {name: sum(t.nbytes for key, t in tensors.items() if key.startswith(name)) / 4 for name in shapes}
    settings = OPTIMIZERS.module(trained.kind).Settings(**CASES[case])
    most = max(number / math.prod(shapes[name]) for name, number in numbers.items())
    assert settings.state_size / 4 < most <= settings.state_size + 0.02  # a counter beside it
    small = "8bit" in trained.kind
    for name, number in numbers.items():
        said = settings.state_of([math.prod(shapes[name])])
        assert number <= said + 2 + 512 * small, name  # code books, of which there is one for all of a kind
        assert not small or said / 2 < number, name


def test_shared_settings_are_no_optimizer() -> None:
    assert not hasattr(common, "build") and "common" not in KINDS
