"""A frozen model whose weights are shared out over two processes (`run.shard`) is trained as a whole one is."""

import json
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lorakit.training.validation import curves
from tests.reliability.harness import Run, Server
from tests.reliability.scene import differences, write_recipe

HOW = (
    "run.accumulate=1",
    "run.steps=6",
    "run.gradient_checkpointing=true",
    # five to train on, three to look at, three prompts: one rank has less to do
    "data.validation=0.3",
    "run.validate_training=1",
    "sample.prompts=['thing 1', 'thing 2', 'other']",
)


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("sharded")
    return lambda name, *how: write_recipe(folder, name, *HOW, *how, model=server.model)


@pytest.fixture(scope="module")
def alone(server: Server, place: Callable[..., Path]) -> Path:
    recipe = place("alone", "run.batch_size=4")
    assert server.run("train", recipe).codes == [0]
    return recipe.with_suffix("")


@pytest.fixture(scope="module")
def sharded(server: Server, place: Callable[..., Path]) -> Path:
    recipe = place("two", "run.batch_size=2", "run.shard=true")
    run = server.run("train", recipe, ranks=2)
    assert set(run.codes) == {0}, run.output()
    made = [[line["numbers"] for line in run.trace(rank) if line["event"] == "micro"] for rank in (0, 1)]
    numbers = [*chain.from_iterable(made[0] + made[1])]
    assert len(made[0]) == len(made[1]) and len(numbers) > len({*numbers}), "some are padding"
    weights = [[line["weights"] for line in run.trace(rank) if line["event"] == "finish"] for rank in (0, 1)]
    assert weights[0] == weights[1] != [], "the same bits on every rank"
    return recipe.with_suffix("")


def assert_agree(one: Path, other: Path) -> None:
    for a, b in zip(lines(one, "metrics.jsonl"), lines(other, "metrics.jsonl"), strict=True):
        assert a["samples"] == b["samples"] and a["timesteps"] == b["timesteps"] and a["lr"] == b["lr"]
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4, abs=0)
    for a, b in zip(lines(one, "validation.jsonl"), lines(other, "validation.jsonl"), strict=True):
        assert a["samples"] == b["samples"] and curves(a) == pytest.approx(curves(b), rel=1e-5, abs=1e-6)
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.sub(theirs[name]).abs().max() < 1e-4, name


def test_a_shared_out_model_learns_what_a_whole_one_does(alone: Path, sharded: Path) -> None:
    assert_agree(alone, sharded)
    for one, other in zip(pictures(alone), pictures(sharded), strict=True):
        assert one.shape == other.shape and (one - other).abs().max() <= 1, "of 256 levels"


def pictures(run: Path) -> list[torch.Tensor]:
    files = sorted((run / "samples" / "step-000006").glob("*.png"))
    assert [file.name for file in files] == ["00.png", "01.png", "02.png"]
    return [torch.from_numpy(np.array(Image.open(file))).int() for file in files]


def whole_and_shared_out(server: Server, place: Callable[..., Path], name: str, *how: str) -> tuple[Run, Path]:
    """Trains on one process and, shared out, on two, which agree; the second run and its recipe."""
    one, two = (
        place(f"{name}-alone", "run.batch_size=4", *how),
        place(name, "run.batch_size=2", "run.shard=true", *how),
    )
    assert server.run("train", one).codes == [0]
    run = server.run("train", two, ranks=2)
    assert set(run.codes) == {0} and "lies in 2 parts" in run.output(), run.output()
    assert_agree(one.with_suffix(""), two.with_suffix(""))
    return run, two


def test_text_encoders_that_learn_beside_it_stay_whole(server: Server, place: Callable[..., Path]) -> None:
    how = ("run.steps=3", "adapter.text_encoder={rank=2, lr=0.02}", "run.validate_training=0")
    run, two = whole_and_shared_out(server, place, "texts", *how)
    weights = [next(line["weights"] for line in run.trace(rank) if line["event"] == "finish") for rank in (0, 1)]
    assert weights[0] == weights[1] and any(name.startswith("text_encoder.") for name in weights[0])
    assert {"lr", "lr_text_encoder"} < lines(two.with_suffix(""), "metrics.jsonl")[0].keys()


def test_small_weights_are_shared_out_as_they_are(server: Server, place: Callable[..., Path]) -> None:
    how = ("run.steps=3", "model.quantize=nf4", "run.validate_training=0", "sample.prompts=[]")
    whole_and_shared_out(server, place, "small", *how)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_launcher_may_ask_for_it_by_a_stage_of_zero(
    server: Server, place: Callable[..., Path], sharded: Path, stage: int
) -> None:
    recipe = place(f"zero-{stage}", "run.batch_size=2")
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    run = server.run("train", recipe, ranks=2, env=asked)
    assert set(run.codes) == {0} and run.output().count(f"ZeRO-{stage}") == 1, run.output()
    assert ("lies in 2 parts" in run.output()) == (stage == 3)
    if stage == 3:
        assert differences(sharded, recipe.with_suffix("")) == []
    else:
        assert_agree(sharded, recipe.with_suffix(""))


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(
    server: Server, place: Callable[..., Path], sharded: Path
) -> None:
    recipe = place("killed", "run.batch_size=2", "run.shard=true")
    folder = recipe.with_suffix("")
    run = server.start("train", recipe, ranks=2)
    run.wait_for("step", step=4)
    run.kill_group(signal.SIGKILL)
    run.wait()
    again = server.run("train", "--resume", folder, ranks=2)
    assert set(again.codes) == {0}, again.output()
    assert "lies in 2 parts" in again.output()
    assert differences(sharded, folder) == []


def test_a_run_goes_on_with_the_model_whole(server: Server, place: Callable[..., Path], alone: Path) -> None:
    recipe = place("stopped", "run.batch_size=2", "run.shard=true")
    folder = recipe.with_suffix("")
    run = server.start("train", recipe, ranks=2)
    run.wait_for("micro")
    run.kill(signal.SIGTERM, rank=1)
    run.wait()
    assert set(run.codes) == {143}, run.output()
    refused = server.run("train", "--resume", folder)
    assert refused.codes == [2] and "run.shard = true" in refused.output()
    again = server.run("train", "--resume", folder, "run.shard=false")
    assert again.codes == [0], again.output()
    assert_agree(alone, folder)


def test_a_lost_process_ends_the_other_with_a_message(server: Server, place: Callable[..., Path]) -> None:
    recipe = place("lost", "run.batch_size=2", "run.shard=true")
    run = server.start("train", recipe, ranks=2)
    run.wait_for("step", step=2, rank=1)
    run.kill(signal.SIGKILL, rank=1)
    run.wait(timeout=60)
    assert run.codes == [1, -9] and run.output(0).count("error: ") == 1, run.output()
    assert "Traceback" not in run.output(0)


def test_what_does_not_go_with_it_is_refused_at_once(server: Server, place: Callable[..., Path]) -> None:
    recipe = place("refused", "run.shard=true", "run.compile=true", "model.compute=int8")
    run = server.run("train", recipe, ranks=2)
    assert run.codes == [2, 2] and run.output(1).count("error: ") == 0
    assert all(f"{key} do not" in run.output(0) for key in ("run.compile", "model.compute"))
