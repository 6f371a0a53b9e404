"""What goes wrong inside a run: numbers that are not finite, and parts that a training does not need."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.families.sd import tiny
from tests.reliability.harness import Patch, Server
from tests.reliability.scene import left, write_recipe

Record = Callable[[str, object], None]
SHORT = ("run.steps=6", "run.sample_every=0", "run.validate_every=3")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def planted(what: str, *steps: int, **more: Any) -> Patch:
    return "not_finite", {"what": what, "steps": steps, **more}


def not_finite(run: Path) -> Iterator[str]:
    """What in the files below `run` is a number and is not finite."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for file in run.rglob("*"):
        if file.suffix in (".json", ".jsonl"):
            for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
                json.loads(text, parse_constant=refuse)
        if file.suffix == ".safetensors":
            yield from (f"{file}: {name}" for name, t in load_file(file).items() if not t.float().isfinite().all())


@pytest.fixture(scope="module")
def good(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in which nothing goes wrong."""
    recipe = write_recipe(tmp_path_factory.mktemp("good"), "good", *SHORT, model=server.model)
    assert server.run("train", recipe).codes == [0]
    return recipe.with_suffix("")


@pytest.mark.parametrize("what", ["latents", "loss", "gradient", "moment"])
def test_what_is_not_finite_is_no_update_and_reaches_no_file(
    server: Server, recipe: Callable[..., Path], good: Path, what: str
) -> None:
    file = recipe("run", *SHORT)
    run = server.run("train", file, patches=[planted(what, 4)])
    assert run.codes == [0], run.output()
    folder = file.with_suffix("")
    updates = {line["step"]: line["same"] for line in run.trace() if line["event"] == "update"}
    assert [step for step, same in updates.items() if same] == [4], "the weights are those of before, bit for bit"
    found, clean = lines(folder), lines(good)
    assert found[3]["loss"] is None and found[3]["grad_norm"] is None and found[3]["skipped"] is True
    assert not any("skipped" in line for line in found[:3] + found[4:])
    for key in ("step", "epoch", "lr", "samples"):
        assert [line[key] for line in found] == [line[key] for line in clean], "the plan goes on as if nothing were"
    assert [line["loss"] for line in found[:3]] == [line["loss"] for line in clean[:3]]
    assert found[4]["loss"] != clean[4]["loss"], "a step is missing"
    assert list(not_finite(folder)) == []
    told = next(line for line in run.output().splitlines() if "step 4" in line and "not finite" in line)
    blamed = [key for key in found[3]["samples"] if f"{key} at t = " in told]
    if what in ("latents", "loss"):  # one example is to blame
        first = [
            line for line in run.trace() if line["event"] == "micro" and set(line["keys"]) <= {*found[3]["samples"]}
        ]
        assert len(blamed) == 1 and any(line["keys"][0] == blamed[0] for line in first)
    else:
        assert set(blamed) == set(found[3]["samples"])


@pytest.mark.parametrize("what", ["loss", pytest.param("gradient", marks=pytest.mark.soak)])
def test_three_such_steps_in_a_row_end_the_run_with_the_last_good_adapter(
    server: Server, recipe: Callable[..., Path], good: Path, what: str
) -> None:
    file = recipe("run", *SHORT, "run.steps=10")
    # two in a row, which are survived, and then three
    run = server.run("train", file, patches=[planted(what, 1, 2, 6, 7, 8)])
    folder = file.with_suffix("")
    assert run.codes == [3] and json.loads((folder / "exit.json").read_text())["code"] == 3, run.output()
    assert run.output().count("error: ") == 1 and "Traceback" not in run.output()
    assert [line["step"] for line in lines(folder) if line["loss"] is None] == [1, 2, 6, 7, 8]
    assert list(not_finite(folder)) == []
    # step 5 was the last with a loss: it was that of the weights of step 4
    last, proven = (load_file(folder / name) for name in ("adapter.safetensors", "adapters/step-000004.safetensors"))
    assert last.keys() == proven.keys() and all(torch.equal(last[name], proven[name]) for name in last)
    pipeline = tiny().stock_pipeline()
    pipeline.load_lora_weights(folder, weight_name="adapter.safetensors")
    assert any("lora" in name for name, _ in pipeline.unet.named_parameters())


@pytest.mark.soak
def test_ranks_skip_together(server: Server, recipe: Callable[..., Path]) -> None:
    file = recipe("run", *SHORT)
    run = server.run("train", file, ranks=3, patches=[planted("gradient", 4, only_rank=1)])
    assert set(run.codes) == {0}, run.output()
    for rank in range(3):
        updates = {line["step"]: line["same"] for line in run.trace(rank) if line["event"] == "update"}
        assert [step for step, same in updates.items() if same] == [4]
    assert list(not_finite(file.with_suffix(""))) == []


NEEDLESS: dict[str, tuple[tuple[str, ...], Patch, str]] = {
    "pictures": (
        ("run.sample_every=2",),
        ("fails", {"where": "lorakit.sampling.pictures:draw"}),
        "sample pictures of step 2 failed",
    ),
    "validation": ((), ("fails", {"where": "lorakit.training.validation:validation_loss"}), "validation of step 3"),
    "report": ((), ("fails", {"where": "lorakit.training.report:write_report"}), "report.html could not be written"),
    "tracker": (
        ('run.trackers=["tensorboard"]',),
        ("fails", {"where": "accelerate.tracking:TensorBoardTracker.log", "after": 2}),
        "tensorboard failed",
    ),
    "tracker at its start": (
        ('run.trackers=["tensorboard"]',),
        ("fails", {"where": "accelerate.tracking:TensorBoardTracker.start"}),
        "tensorboard failed",
    ),
    "adapters of steps": (
        (),
        ("fails", {"where": "lorakit.export.files:write_adapter", "error": "OSError", "times": 3}),
        "adapters/ has no file of step 2",
    ),
}


@pytest.mark.parametrize("part", NEEDLESS)
def test_a_part_that_fails_is_a_warning_and_changes_nothing(
    server: Server, recipe: Callable[..., Path], good: Path, part: str
) -> None:
    how, patch, warning = NEEDLESS[part]
    file = recipe("run", *SHORT, *how)
    run = server.run("train", file, patches=[patch])
    assert run.codes == [0] and warning in run.output(), run.output()
    assert "Traceback" not in run.output()
    found, clean = left(file.with_suffix("")), left(good)
    same = [name for name in clean if name.startswith(("metrics.jsonl", "adapter.safetensors", "checkpoints"))]
    assert len(same) > 40 and [name for name in same if found.get(name) != clean[name]] == []
