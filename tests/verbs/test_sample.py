"""`lorakit sample`: adapters at their weights, on the command line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.cli.main import main
from lorakit.families import sd
from lorakit.recipe import Recipe
from lorakit.verbs.train import train


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def sample(out: Path, *arguments: str) -> list[Path]:
    before = set(out.glob("*")) if out.exists() else set()
    main(["sample", str(sd.tiny().path), "--steps", "2", "--size", "32x32", "--out", str(out), *arguments])
    return sorted(set(out.glob("*")) - before)


def test_weights_and_several_adapters(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    adapter = train(make_recipe("run", "run.steps=2", "optimizer.lr=0.1")).adapter
    out = tmp_path / "pictures"
    plain = pixels(sample(out, "--prompt", "thing")[0])
    zero = pixels(sample(out, "--prompt", "thing", "--adapter", f"{adapter}:0")[0])
    full = pixels(sample(out, "--prompt", "thing", "--adapter", str(adapter))[0])
    halves = pixels(sample(out, "--prompt", "thing", *["--adapter", f"{adapter}:0.5"] * 2)[0])
    assert np.array_equal(plain, zero)
    assert not np.array_equal(plain, full)
    assert np.abs(full - halves).max() <= 1, "two halves are a whole"


def test_pictures_are_numbered_on_and_seeds_counted(tmp_path: Path) -> None:
    first = sample(tmp_path, "--prompt", "a", "--prompt", "a", "--seed", "3")
    assert [p.name for p in first] == ["0000.png", "0001.png"]
    assert not np.array_equal(pixels(first[0]), pixels(first[1]))
    again = sample(tmp_path, "--prompt", "a", "--seed", "4")
    assert [p.name for p in again] == ["0002.png"]
    assert np.array_equal(pixels(again[0]), pixels(first[1]))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--size", "33x32"], "--size 33x32"),
        (["--size", "big"], "--size big"),
        (["--steps", "0"], "--steps"),
        (["--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--family", "sdd"], "Did you mean sd?"),
    ],
)
def test_bad_input(arguments: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(sd.tiny().path), "--prompt", "a", "--out", str(out), *arguments])
    assert caught.value.code == 2
    assert wanted in capsys.readouterr().err
    assert not out.exists()
