"""What is trained is what was said, and stays so over a resume: layers with rates of their own, attention's kernel."""

import json
import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.core.errors import InputError, InterruptedRun
from lorakit.recipe import Recipe
from lorakit.training import kernels, step
from lorakit.training.execution import attention
from lorakit.training.keeper import Keeper
from lorakit.training.metrics import MetricsFile
from lorakit.verbs.train import dry_run, resume, train

Make = Callable[..., Recipe]
PATTERNS = ("adapter.patterns=[{match='attn2', rank=3, lr=0.002}, {match='up_blocks.*to_k', rank=0}]",)
OF_TEXT = ("adapter.text_encoder.rank=2", "adapter.text_encoder.patterns=[{match='mlp', lr=0.003}]")


def records(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("kind", [pytest.param("adamw", marks=pytest.mark.slow), "schedule_free"])
def test_patterns_have_rates_that_are_named_and_go_on_after_a_resume(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    words = (*PATTERNS, *OF_TEXT, f"optimizer.kind={kind}", "run.steps=4", "optimizer.schedule.warmup=2")
    whole = train(make_recipe("whole", *words)).output
    for line in records(whole):
        share = line["lr"] / 0.01  # type: ignore[operator]
        rates = {name: value for name, value in line.items() if name.startswith("lr")}
        assert rates.keys() == {"lr", "lr_attn2", "lr_text_encoder", "lr_text_encoder_mlp"}
        assert rates["lr_attn2"] == pytest.approx(0.002 * share)
        assert rates["lr_text_encoder_mlp"] == pytest.approx(0.003 * share)
    write = MetricsFile.write

    def write_and_stop(self: MetricsFile, record: dict[str, object]) -> None:
        write(self, record)
        if record["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr(MetricsFile, "write", write_and_stop)
        train(make_recipe("stopped", *words))
    stopped = whole.parent / "stopped"
    resume(stopped)
    assert records(stopped) == records(whole)
    assert (stopped / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    ranks = {name: len(t) for name, t in load_file(whole / "adapter.safetensors").items() if "lora_down" in name}
    assert {rank for name, rank in ranks.items() if "unet" in name and "attn2" in name} == {3}
    assert not any("up_blocks" in name and "to_k" in name for name in ranks)


def test_a_rate_moves_its_own_layers_alone(make_recipe: Make) -> None:
    def moved(name: str, lr: float) -> dict[str, torch.Tensor]:
        words = ("run.steps=1", "optimizer.weight_decay=0.0", f"adapter.patterns=[{{match='attn2', lr={lr}}}]")
        return load_file(train(make_recipe(name, *words)).output / "adapter.safetensors")

    one, other = moved("one", 0.01), moved("other", 0.02)
    for name in one:  # A has no gradient while B is zero
        assert torch.equal(one[name], other[name]) == ("attn2" not in name or "lora_up" not in name), name


def test_all_layers_may_have_rates_of_their_own(make_recipe: Make) -> None:
    run = train(make_recipe("run", "run.steps=2", "adapter.patterns=[{match='attn', lr=0.002}]")).output
    assert records(run)[0]["lr"] == 0.01 and records(run)[0]["lr_attn"] == 0.002


def test_an_optimizer_with_one_rate_refuses_others_by_name(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"adapter.patterns.0.lr = 0.5: prodigy finds one rate"):
        train(make_recipe("run", "optimizer.kind=prodigy", "optimizer.lr=1.0", "adapter.patterns=[{match='q',lr=0.5}]"))


def test_names_of_rates_do_not_meet(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="lr_text_encoder"):
        train(make_recipe("run", *OF_TEXT, "adapter.patterns=[{match='text_encoder|', lr=0.5}]"))


def test_a_run_keeps_to_the_kernel_that_was_measured_before_its_first_step(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, used = [], []

    def slow_but_for_math(calls: Any, *rest: Any) -> dict[str, float]:
        measured.append(calls)
        return {"auto": 2.0, "flash": 2.0, "math": 1.0}

    def noted(kernel: Any) -> Any:
        used.append(kernel)
        return attention(kernel)

    monkeypatch.setattr(kernels, "timed", slow_but_for_math)
    monkeypatch.setattr(step, "attention", noted)
    monkeypatch.setattr(Keeper, "finish", lambda self, step: self.output)
    how = ("run.check_model=false", "run.sample_every=0", "run.attention=fastest", "optimizer.schedule.kind=constant")
    run = train(make_recipe("run", *how, "run.steps=1")).output
    [calls] = measured
    assert sum(calls.values()) > 2 and all(one.scores > 0 for one in calls)
    assert tomllib.loads((run / "recipe.toml").read_text())["run"]["attention"] == "math"
    state = json.loads((run / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["settings"]["run.attention"] == '"math"'
    resume(run, overrides=["run.steps=2"], allow=["run.steps"])
    assert len(measured) == 1, "a resume goes on in the same kernel"
    dry_run(make_recipe("dry", *how))
    assert len(measured) == 2 and {*used} == {"math"}


def test_the_same_bits_and_the_clocks_choice_exclude_each_other(
    make_recipe: Make,
) -> None:
    with pytest.raises(InputError, match="name a kernel"):
        make_recipe("both", "run.attention=fastest", "run.deterministic=true")
