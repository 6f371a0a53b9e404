"""A run's folder with some steps behind it, what the run does to it next, and what must be true of it whatever happens.

The content of step n is a pure function of n, so that whatever is found can be compared bit by bit.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorakit.core.files import write_json, write_tensors, write_text
from lorakit.training import checkpoint
from lorakit.training.folder import RunFolder
from lorakit.training.metrics import MetricsFile

STEPS = 4  # the step that the next save is of
Action = Callable[[Path], None]


def tensors(step: int, *, attempt: int = 0) -> dict[str, dict[str, Tensor]]:
    """`attempt` tells two checkpoints of one step apart."""
    weight = torch.full((7, 5), step + attempt / 8)
    moments = {"unet.a.exp_avg": weight / 3, "unet.a.step": torch.tensor(float(step)), "unet.a.q": weight.byte()}
    return {"adapter": {"unet.a": weight}, "optimizer": moments, "ema": {"unet.a": weight * 2}}


def save(run: Path, step: int, *, attempt: int = 0) -> None:
    """What a run writes at a checkpoint, in the order in which it does."""
    content = tensors(step, attempt=attempt)
    checkpoint.save(run / "checkpoints", step, tensors=content, state={"step": step, "attempt": attempt})
    write_tensors(run / "adapters" / f"step-{step:06d}.safetensors", content["adapter"])
    write_tensors(run / "adapter.safetensors", content["adapter"])
    checkpoint.prune(run / "checkpoints", keep_last=2, keep=[1])


def begin(run: Path, steps: range) -> None:
    """A run that was killed when it had done these steps and had saved after each."""
    write_text(run / "recipe.toml", "steps = 9\n")
    file = MetricsFile(run / "metrics.jsonl", step=0)
    for step in steps:
        file.write(record(step))
        file.flush()
        save(run, step)
    write_json(run / "exit.json", {"code": 1, "reason": "x"})
    (run / "lock").write_text("1\n")
    (run / ".metrics.jsonl.1.tmp").touch()
    litter = run / "checkpoints" / ".step-000003.1.tmp"
    shutil.copytree(run / "checkpoints" / f"step-{steps[-1]:06d}", litter)


def record(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1 / step, "samples": ["é" * step]}


def go_on(run: Path) -> None:
    """Another step and its save."""
    file = MetricsFile(run / "metrics.jsonl", step=STEPS - 1)
    file.write(record(STEPS))
    file.flush()
    save(run, STEPS)


def save_again(run: Path) -> None:
    """The save of a step of which there is a checkpoint already."""
    save(run, STEPS - 1, attempt=1)


def take(run: Path) -> None:
    """How a resume begins and ends."""
    folder = RunFolder.existing(run)
    checkpoint.newest(run / "checkpoints")
    MetricsFile(run / "metrics.jsonl", step=STEPS - 2)
    folder.release(code=0, reason="done")


# name -> the steps before, the action
SCENES: dict[str, tuple[range, Action]] = {
    "a save": (range(1, STEPS), go_on),
    "a save over another": (range(STEPS - 2, STEPS), save_again),
    "a save over the only one": (range(STEPS - 1, STEPS), save_again),
    "a resume": (range(1, STEPS), take),
}


def whole(run: Path) -> tuple[int, int]:
    """Step and attempt of the newest checkpoint; asserts that all there is in `run` is whole."""
    found, skipped = checkpoint.newest(run / "checkpoints")
    assert found is not None and skipped == [], skipped
    assert all(checkpoint.damage(path) is None for path in checkpoint.listed(run / "checkpoints"))
    step, attempt = found.state["step"], found.state["attempt"]
    expected = tensors(step, attempt=attempt)
    assert found.tensors.keys() == expected.keys()
    for name, part in expected.items():
        assert found.tensors[name].keys() == part.keys()
        assert all(torch.equal(found.tensors[name][key], tensor) for key, tensor in part.items())
    for file in [*(run / "adapters").glob("*.safetensors"), run / "adapter.safetensors"]:
        assert load_file(file)["unet.a"].shape == (7, 5)
    return step, attempt


def litter(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*")]


def metrics(run: Path) -> list[int]:
    """The steps in metrics.jsonl, of which every line is whole."""
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def tree(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
