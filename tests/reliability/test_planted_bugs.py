"""What a resume could forget is planted, one bug at a time, and the comparison of two runs sees each of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Patch, Run, Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import Survivor, Undisturbed, undisturbed, unlike

DEATH: Patch = ("dies", {"where": "lorakit.training.step:run_step", "after": 6})
SCALER: Patch = ("cpu_scaler", {})

BUGS: dict[str, Patch] = {
    "noise from the global generator": ("noise_from_the_global_generator", {}),
    "position of the sampler": ("sampler_one_step_ahead", {}),
    "step of the schedule": ("schedule_from_its_start", {}),
    "one moment of one layer": ("state_not_restored", {"entry": "exp_avg", "only_first": True}),
    "second moments": ("state_not_restored", {"entry": "exp_avg_sq", "only_first": False}),
    "count of Adam's steps": ("state_not_restored", {"entry": "step", "only_first": False}),
    "scale of the loss": ("scaler_not_restored", {}),
    "average of the weights": ("average_not_restored", {}),
}
# seen in what they say they change, not only in what follows from it
SIGNS = {
    "noise from the global generator": "micro step",
    "position of the sampler": "samples",
    "step of the schedule": "lr",
    "scale of the loss": "state.json",
    "average of the weights": "ema.safetensors",
}


@pytest.fixture(scope="module")
def killed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Undisturbed, Path, Run]:
    """An undisturbed run with everything that can be forgotten, and one that died after its sixth step."""
    folder = tmp_path_factory.mktemp("planted")
    how = ("run.ema.decay=0.9", "run.steps=8", "run.sample_every=0", "run.validate_every=0")
    whole = undisturbed(server, write_recipe(folder, "whole", *how, model=server.model), patches=[SCALER])
    dead = server.run("train", write_recipe(folder, "dead", *how, model=server.model), patches=[SCALER, DEATH])
    assert dead.codes == [-9]
    return whole, folder / "dead", dead


def gone_on(server: Server, killed: tuple[Undisturbed, Path, Run], folder: Path, patches: list[Patch]) -> list[str]:
    """What differs from the undisturbed run, where the dead one goes on with `patches`."""
    whole, dead, first = killed
    copy = Path(shutil.copytree(dead, folder / "copy"))
    second = server.run("train", "--resume", copy, patches=[SCALER, *patches])
    assert second.codes == [0], second.output()
    traces: list[list[dict[str, Any]]] = [first.trace(), second.trace()]
    return unlike(whole, Survivor(copy, traces))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(server: Server, killed: tuple[Undisturbed, Path, Run], tmp_path: Path, bug: str) -> None:
    found = gone_on(server, killed, tmp_path, [BUGS[bug]])
    assert any(SIGNS.get(bug, "adapter.safetensors") in name for name in found), found


@pytest.mark.parametrize("patches", [[], [("threads", {"count": 2})]], ids=["as it was", "other threads"])
def test_without_a_bug_nothing_differs(
    server: Server, killed: tuple[Undisturbed, Path, Run], tmp_path: Path, patches: list[Patch]
) -> None:
    assert gone_on(server, killed, tmp_path, patches) == []
