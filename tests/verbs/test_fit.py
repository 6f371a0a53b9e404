"""What does not fit is tried with smaller settings, in their order; what was found is the run's own recipe."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.recipe import Recipe, load_recipe
from lorakit.training import dry, loop
from lorakit.training.dry import TooLarge
from lorakit.verbs.fit import fitted
from lorakit.verbs.train import dry_run, resume, train

Make = Callable[..., Recipe]


def tried(
    recipe: Recipe, *, enough: int, saved: dict[str, int] | None = None, **more: Any
) -> tuple[Recipe, list[Recipe]]:
    """The recipe that was found where the trial of this number is the first that fits, and all that were tried; each
    takes a GB less than the one before."""
    seen: list[Recipe] = []

    def attempt(recipe: Recipe) -> tuple[None, int]:
        seen.append(recipe)
        peak = int((12.5 - len(seen)) * 1e9)
        if len(seen) < enough:
            raise TooLarge("too large", peak=peak, saved=saved)
        return None, peak

    return fitted(recipe, attempt, **more)[0], seen


def test_rungs_go_from_what_changes_nothing_to_what_costs_most(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto")
    found, seen = tried(recipe, enough=10, gpu=False)
    shares = [False, 0.25, 0.5, True]
    assert [r.run.gradient_checkpointing for r in seen] == [*shares, *shares, True, True]
    assert [(r.run.batch_size, r.run.accumulate) for r in seen] == [(2, 2)] * 4 + [(1, 4)] * 6
    assert [r.model.quantize for r in seen] == [None] * 8 + ["int8", "nf4"]
    assert found == seen[-1] and all(r.run.offload is None and r.optimizer.kind == "adamw" for r in seen)
    with pytest.raises(InputError, match="too large\nrun.fit has nothing left"):
        tried(recipe, enough=11, gpu=False)
    with pytest.raises(InputError, match='^too large\nrun.fit = "auto"'):
        tried(make_recipe("other"), enough=2, gpu=False)


def test_weights_that_are_multiplied_in_8_bits_stay_so(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto", "model.compute=int8")
    assert len(tried(recipe, enough=8, gpu=False)[1]) == 8
    with pytest.raises(InputError, match="nothing left"):
        tried(recipe, enough=9, gpu=False)


def test_a_gpu_s_limit_holds_for_the_trials_alone(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(32e9)))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    tried(make_recipe("run", "run.fit=8GB"), enough=3, gpu=True)
    assert limits == [0.25, 1.0], "another training of this process has its own"


def test_memory_that_lacks_before_the_dry_step_is_a_reason_to_try_the_next(make_recipe: Make) -> None:
    seen: list[Recipe] = []

    def attempt(recipe: Recipe) -> tuple[None, None]:
        seen.append(recipe)
        if len(seen) < 3:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return None, None

    assert fitted(make_recipe("run", "run.fit=auto"), attempt, gpu=False)[0] == seen[2]
    with pytest.raises(RuntimeError, match="another"):
        fitted(make_recipe("other"), lambda recipe: (_ for _ in ()).throw(RuntimeError("another")), gpu=False)


def test_what_is_asked_for_already_is_kept(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto", "run.gradient_checkpointing=0.5", "run.batch_size=1")
    _, seen = tried(recipe, enough=3, gpu=False)
    assert [r.run.gradient_checkpointing for r in seen] == [0.5, True, True]
    assert seen[2].model.quantize == "int8"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_optimizers_state_is_rounded_where_that_saves_something(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto", "run.batch_size=1", "run.gradient_checkpointing=true")
    for saved, kinds in ((99e6, ["adamw"] * 3), (100e6, ["adamw", "adamw8bit", "adamw8bit"])):
        _, seen = tried(recipe, enough=3, gpu=False, saved={'optimizer.kind = "adamw8bit"': int(saved)})
        assert [r.optimizer.kind for r in seen] == kinds
        assert seen[2].optimizer.lr == 0.01, "as the recipe has it"


def test_it_says_what_is_taken_and_why_something_is_changed(
    make_recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lorakit")
    tried(make_recipe("run", "run.fit=9.6GB"), enough=3, gpu=False)
    again = "tried with run.gradient_checkpointing ="
    assert caplog.messages == [
        f"run.fit: 11.50 GB of 9.60 GB allowed; {again} 0.25: 25 % of the blocks compute twice",
        f"run.fit: 10.50 GB of 9.60 GB allowed; {again} 0.5: 50 % of the blocks compute twice",
        "run.fit: 9.50 GB of 9.60 GB allowed with run.gradient_checkpointing = 0.5 (without: 11.50 GB)",
    ]
    caplog.clear()
    tried(make_recipe("run", "run.fit=auto"), enough=1, gpu=False)
    assert caplog.messages == ["run.fit: 11.50 GB with the recipe as it is"]
    caplog.clear()
    tried(make_recipe("run"), enough=1, gpu=False)
    assert not caplog.messages


def test_a_resume_changes_no_number(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto")
    with pytest.raises(InputError):
        tried(recipe, enough=5, gpu=False, numbers_stay=True)
    _, seen = tried(recipe, enough=4, gpu=False, numbers_stay=True)
    assert [r.run.gradient_checkpointing for r in seen] == [False, 0.25, 0.5, True]
    assert {r.run.batch_size for r in seen} == {2}


def test_a_run_is_begun_with_what_fits_and_says_so(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(make_recipe("plain", "run.gradient_checkpointing=0.25", "run.batch_size=1", "run.accumulate=4"))
    # in twos it shall not fit, nor without checkpoints: the sixth trial does
    honest, peaks = dry.memory.peak, iter([3e9, 2.9e9, 2.8e9, 2.7e9, 2.6e9, 1e9])
    monkeypatch.setattr(dry.memory, "peak", lambda: int(next(peaks)))
    result = train(make_recipe("run", "run.fit=2GB"))
    monkeypatch.setattr(dry.memory, "peak", honest)
    kept = load_recipe(result.output / "recipe.toml")
    assert (kept.run.gradient_checkpointing, kept.run.batch_size, kept.run.accumulate) == (0.25, 1, 4)
    assert kept.run.fit == "2GB"

    def losses(run: Any) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert losses(result.output) == losses(plain.output)
    assert resume(result.output, overrides=["run.steps=7"], allow=["run.steps"]).steps == 7


def test_what_cannot_fit_leaves_no_run(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=0.001GB", "model.quantize=int8", "run.gradient_checkpointing=true")
    with pytest.raises(InputError, match=r"does not fit into memory.*\n.*nothing left"):
        train(recipe)
    assert not [*Path(recipe.run.output).glob("recipe.toml")], "a mended recipe may take the folder"
    with pytest.raises(InputError, match="nothing left"):
        dry_run(recipe)


@pytest.mark.parametrize("done", [0, 2])
def test_memory_that_lacks_in_a_step_itself_is_told_alike(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """On a CPU the dry step is left out where the first step is as large."""
    monkeypatch.setattr("lorakit.data.loader.Loader.is_largest", lambda self, step: True)
    step, steps = loop.run_step, iter(range(99))

    def lacking(*args: Any, **options: Any) -> Any:
        if next(steps) == done:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return step(*args, **options)

    monkeypatch.setattr(loop, "run_step", lacking)
    recipe = make_recipe("run")
    with pytest.raises(TooLarge, match=r"does not fit into memory\. run\..* = .* would save some .* kB") as caught:
        train(recipe)
    assert "data.buckets.resolution always helps" in str(caught.value) and caught.value.exit_code == 2
    run = Path(recipe.run.output)
    assert (run / "recipe.toml").exists() == (run / "metrics.jsonl").exists() == bool(done)
    monkeypatch.setattr(loop, "run_step", step)
    if not done:
        assert train(recipe).steps == 6, "a mended recipe may take the folder"


def test_checkpoints_of_some_blocks_change_no_bit(make_recipe: Make) -> None:
    """Beside small weights, fused adapters, and after a resume that has others."""

    def trained(name: str, *overrides: str) -> Path:
        how = (
            "model.quantize=int8",
            'adapter.targets=["to_q", "to_v", "proj"]',
            "run.check_model=false",
            "optimizer.schedule.kind=constant",
        )
        return train(make_recipe(name, *how, *overrides)).output

    def learned(run: Path) -> bytes:
        return (run / "checkpoints" / "step-000002" / "adapter.safetensors").read_bytes()

    plain, half = trained("plain", "run.steps=2"), trained("half", "run.steps=2", "run.gradient_checkpointing=0.5")
    assert learned(half) == learned(plain)
    parts = trained("parts", "run.steps=1", "run.gradient_checkpointing=0.5")
    resume(parts, overrides=["run.steps=2", "run.gradient_checkpointing=0.25"], allow=["run.steps"])
    assert learned(parts) == learned(plain)
