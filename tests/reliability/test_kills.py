"""`kill -9` at any moment, as often as you like: the run that is gone on with is the run that nobody killed."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from random import Random

import pytest

from tests.reliability.harness import Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import survive, undisturbed, unlike

PER_RUN = 10  # kills that a run has to survive
DISK = ("slow", {"where": "lorakit.core.files:_sync", "seconds": 0.002})  # a disk that syncs as slowly as disks do
ENCODER = ("slow", {"where": "lorakit.families.sd:StableDiffusion.encode_images", "seconds": 0.05})


def kills(server: Server, folder: Path, wanted: int, *, seed: int, extra: tuple[str, ...] = ()) -> Counter[str]:
    """Kills runs at least `wanted` times and compares each in the end; where the kills fell."""
    whole = undisturbed(server, write_recipe(folder, "whole", *extra, model=server.model), patches=[DISK])

    def trial(number: int) -> Counter[str]:
        # three in five are killed at a uniform moment, one as it saves, one while a cold cache is filled
        aim = (None, "cache", None, "save", None)[number % 5]
        cold = number % 5 < 2
        cache = folder / f"cache-{number}" if cold else folder / "cache"
        recipe = write_recipe(folder, f"killed-{number}", *extra, model=server.model, cache=cache)
        survivor = survive(
            server,
            recipe,
            kills=PER_RUN,
            random=Random(f"{seed} {number}"),
            seconds=whole.seconds,
            aim=aim,
            patches=[DISK, ENCODER] if cold else [DISK],
        )
        assert unlike(whole, survivor) == [], f"trial {number} of seed {seed}, killed at {dict(survivor.kills)}"
        return survivor.kills

    fell = Counter[str]()
    numbers = count()
    with ThreadPoolExecutor(2) as two:  # a run waits for the disk half of its time
        while fell.total() < wanted:
            fell += sum(two.map(trial, islice(numbers, 2)), Counter[str]())
    return fell


def test_killed_runs_end_with_the_bits_of_one_that_nobody_killed(
    server: Server, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    fell = kills(server, tmp_path, 50, seed=4)
    record_property("trials", fell.total())
    record_property("where", dict(fell))
    assert fell["save"] and fell["cache"], "some died while saving and while caching"


@pytest.mark.soak
@pytest.mark.parametrize("block", range(10))
def test_500_kills(server: Server, tmp_path: Path, record_property: Callable[[str, object], None], block: int) -> None:
    extra = ("data.workers=2",) if block % 3 == 2 else ()
    fell = kills(server, tmp_path, 50, seed=100 + block, extra=extra)
    record_property("trials", fell.total())
    record_property("where", dict(fell))
