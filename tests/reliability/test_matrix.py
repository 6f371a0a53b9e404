"""Whatever a recipe asks for, a killed run goes on with the same bits: every combination of what has a state.

The soak tries all combinations, the quick part a few that hold every pair of settings at least once, bar optimizers.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from lorakit.optimizers import OPTIMIZERS
from tests.reliability.harness import Patch, Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import Survivor, goes_on, undisturbed, unlike

SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text-encoder": ((), ("adapter.text_encoder.rank=2",)),
    "accumulate": (("run.accumulate=1",), ("run.accumulate=3",)),
    "workers": ((), ("data.workers=2",)),
    "crops": ((), ("data.sources.0.crop=random",)),  # encoded in every step, not cached
    "dropout": ((), ("adapter.dropout=0.3", "data.sources.0.caption_dropout=0.3")),
    "ema": ((), ("run.ema.decay=0.9",)),
}
SHORT = ("run.steps=6", "run.sample_every=0", "run.validate_every=0", "data.validation=0.0")
# in these rows each two settings meet in all four ways
QUICK = ("000000", "011110", "110101", "001101", "101010", "011001", "110111")


def combination(bits: str) -> tuple[str, ...]:
    return tuple(o for of_setting, bit in zip(SETTINGS.values(), bits, strict=True) for o in of_setting[int(bit)])


def named(bits: str) -> str:
    return "+".join(name for name, bit in zip(SETTINGS, bits, strict=True) if bit == "1") or "plain"


def killed_once(server: Server, folder: Path, optimizer: str, bits: str) -> None:
    how = (*SHORT, f"optimizer.kind={optimizer}", *combination(bits))
    small = "8bit" in optimizer
    if small:  # states of less than 4,096 numbers stay in 32 bits
        how += ("adapter.rank=32", 'adapter.targets=["ff.net.0.proj"]')
    recipes = [write_recipe(folder, name, *how, model=server.model) for name in ("whole", "killed")]
    random = Random(f"{optimizer} {bits}")
    # in the fourth or fifth of six steps, with a checkpoint after each second one: steps are left to make. It kills
    # itself, for whoever kills from outside may come too late
    where = random.choice(["lorakit.training.step:run_step", "lorakit.optimizers.state:guarded_step"])
    steps_done = random.choice([3, 4])
    death: Patch = ("dies", {"where": where, "after": steps_done})
    with ThreadPoolExecutor(1) as other:  # beside each other, on two cores
        of_whole = other.submit(undisturbed, server, recipes[0])
        first = server.run("train", recipes[1], patches=[death])
    whole = of_whole.result()
    assert first.codes == [-signal.SIGKILL], first.output()
    second = server.run(*goes_on(recipes[1]))
    assert second.codes == [0], second.output()
    again = [line["step"] for line in second.trace() if line["event"] == "step"]
    assert again == list(range(steps_done // 2 * 2 + 1, 7)), "it goes on from the last checkpoint"
    assert unlike(whole, Survivor(recipes[1].with_suffix(""), [first.trace(), second.trace()])) == []
    state = load_file(whole.folder / "checkpoints" / "step-000006" / "optimizer.safetensors")
    assert small == any(tensor.dtype == torch.uint8 for tensor in state.values())


def test_the_quick_rows_hold_every_pair() -> None:
    for one, other in combinations(range(len(SETTINGS)), 2):
        assert {(row[one], row[other]) for row in QUICK} == set(product("01", repeat=2)), (one, other)


def rows() -> Iterator[tuple[str, str]]:
    """Each quick row with an optimizer of its own."""
    yield from zip((OPTIMIZERS.names() * len(QUICK))[: len(QUICK)], QUICK, strict=True)


@pytest.mark.parametrize(("optimizer", "bits"), [pytest.param(o, b, id=f"{o}-{named(b)}") for o, b in rows()])
def test_a_few_combinations(
    server: Server, tmp_path: Path, record_property: Callable[[str, object], None], optimizer: str, bits: str
) -> None:
    killed_once(server, tmp_path, optimizer, bits)
    record_property("trials", 1)


@pytest.mark.soak
@pytest.mark.parametrize("bits", ["".join(bits) for bits in product("01", repeat=len(SETTINGS))], ids=named)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_every_combination(
    server: Server, tmp_path: Path, record_property: Callable[[str, object], None], optimizer: str, bits: str
) -> None:
    killed_once(server, tmp_path, optimizer, bits)
    record_property("trials", 1)
