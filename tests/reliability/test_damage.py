"""A thousand damaged checkpoints: each is seen, and the one before it is taken, bit by bit."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.training import checkpoint
from tests.reliability import saves

TRIALS = 1000


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def one(path: Path, rng: random.Random) -> Path:
    return rng.choice(files(path))


def flip(path: Path, rng: random.Random) -> None:
    file = one(path, rng)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_off(path: Path, rng: random.Random) -> None:
    file = one(path, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def zero(path: Path, rng: random.Random) -> None:
    """A run of zeros, as a power cut leaves them; over bytes that are not all zeros already."""
    file = one(path, rng)
    data = file.read_bytes()
    start = rng.choice([i for i, byte in enumerate(data) if byte])
    length = min(rng.randint(1, 4096), len(data) - start)
    file.write_bytes(data[:start] + bytes(length) + data[start + length :])


def lengthen(path: Path, rng: random.Random) -> None:
    with one(path, rng).open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b" "]) * rng.randint(1, 9))


def empty(path: Path, rng: random.Random) -> None:
    one(path, rng).write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    one(path, rng).unlink()


def remove_all(path: Path, rng: random.Random) -> None:
    for file in files(path):
        file.unlink()


def swap(path: Path, rng: random.Random) -> None:
    """Two files of one checkpoint."""
    a, b = rng.sample(files(path), 2)
    kept = a.read_bytes()
    b.replace(a)
    b.write_bytes(kept)


def swap_with_older(path: Path, rng: random.Random) -> None:
    """One to all but one of the files are those of the checkpoint before."""
    for file in rng.sample(files(path), rng.randint(1, len(files(path)) - 1)):
        shutil.copy(path.parent / "step-000001" / file.name, file)


def older_as_newer(path: Path, rng: random.Random) -> None:
    """All files are: a whole checkpoint under another's name."""
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-000001", path)


def add(path: Path, rng: random.Random) -> None:
    shutil.copy(one(path, rng), path / "another.safetensors")


DAMAGES = [
    flip,
    flip,
    flip,
    cut_off,
    zero,
    lengthen,
    empty,
    remove,
    remove_all,
    swap,
    swap_with_older,
    older_as_newer,
    add,
]


def test_a_thousand_damages_are_seen_and_the_good_one_before_is_taken(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors=saves.tensors(step), state={"step": step, "attempt": 0})
    good, bad = tmp_path / "step-000001", tmp_path / "step-000002"
    bad.rename(tmp_path / "kept")
    expected, seen, rng = checkpoint.load(good), Counter[str](), random.Random(4)
    for trial in range(TRIALS):
        shutil.copytree(tmp_path / "kept", bad)
        damage = DAMAGES[trial % len(DAMAGES)]
        damage(bad, rng)
        found, skipped = checkpoint.newest(tmp_path)
        assert found is not None and found.path == good, f"trial {trial}: {damage.__name__} was not seen"
        assert len(skipped) == 1 and skipped[0].startswith("step-000002 is damaged: ")
        assert all(
            torch.equal(found.tensors[name][key], tensor)
            for name, part in expected.tensors.items()
            for key, tensor in part.items()
        )
        seen[damage.__name__] += 1
        shutil.rmtree(bad)
    assert seen.total() == TRIALS and min(seen.values()) > 50
    record_property("trials", TRIALS)
    shutil.copytree(tmp_path / "kept", bad)
    assert checkpoint.newest(tmp_path)[0].path == bad  # type: ignore[union-attr]


def test_two_folders_that_were_swapped_are_both_seen(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors=saves.tensors(step), state={"step": step})
    first, second = checkpoint.listed(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(InputError) as caught:
        checkpoint.newest(tmp_path)
    assert sum("folder was renamed" in problem for problem in caught.value.problems) == 2
