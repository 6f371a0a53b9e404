"""Whatever a recipe asks for, a killed run goes on with the same bits: every combination of what has a state.

The soak tries all combinations, the quick part a few that hold every pair of settings at least once, bar optimizers.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from lorakit.optimizers import OPTIMIZERS
from tests.reliability.harness import Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import survive, undisturbed, unlike

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
    with ThreadPoolExecutor(1) as other:  # beside each other, on two cores
        of_whole = other.submit(undisturbed, server, recipes[0])
        random = Random(f"{optimizer} {bits}")
        # there is a checkpoint after the second and the fourth of six steps
        survivor = survive(server, recipes[1], kills=1, random=random, seconds=0, aim="step", between=(3, 4))
    whole = of_whole.result()
    assert survivor.kills.total() == 1
    again = [line["step"] for line in survivor.traces[1] if line["event"] == "step"]
    assert 1 not in again, "it went on from a checkpoint"
    assert unlike(whole, survivor) == []
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
