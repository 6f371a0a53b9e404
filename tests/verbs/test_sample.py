"""`lorakit sample`: adapters at their weights, on the command line."""

import getpass
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit.cli.main import main
from lorakit.core.files import make_folder, sha256_file
from lorakit.export import write_adapter
from lorakit.families import sd
from lorakit.recipe import Recipe
from lorakit.sampling import pictures
from lorakit.verbs.train import train
from tests.export.tiny import made
from tests.families.single import single_file
from tests.verbs.conftest import in_processes


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
    assert np.array_equal(plain, pixels(sample(out, "--prompt", "thing", "--adapter", f"{adapter}:unet=0")[0]))
    assert not np.array_equal(plain, full)
    assert np.abs(full - halves).max() <= 1, "two halves are a whole"


def test_pictures_are_numbered_on_and_seeds_counted(tmp_path: Path) -> None:
    first = sample(tmp_path, "--prompt", "a", "--prompt", "a", "--seed", "3")
    assert [p.name for p in first] == ["0000.png", "0001.png"]
    assert not np.array_equal(pixels(first[0]), pixels(first[1]))
    again = sample(tmp_path, "--prompt", "a", "--seed", "4")
    assert [p.name for p in again] == ["0002.png"]
    assert np.array_equal(pixels(again[0]), pixels(first[1]))


def test_a_base_of_one_file_draws_what_its_folder_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(single_file("sd"), tmp_path / "model.safetensors")
    given = ["sample", str(tmp_path / "model.safetensors"), "--prompt", "a", "--steps", "2", "--size", "32x32"]
    main([*given, "--config", str(sd.tiny().path), "--out", str(tmp_path / "file")])
    folder = sample(tmp_path / "folder", "--prompt", "a")
    assert np.array_equal(pixels(tmp_path / "file" / "0000.png"), pixels(folder[0]))
    half = sample(tmp_path / "folder", "--prompt", "a", "--precision", "bf16")[0]
    assert 0 < np.abs(pixels(half) - pixels(folder[0])).mean() < 8
    assert json.loads(Image.open(half).text["lorakit"])["precision"] == "bf16"  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        main([*given, "--out", str(tmp_path / "none")])
    assert "is a single file: give a diffusers folder" in capsys.readouterr().err


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with a picture of 40x32 pixels, a mask of its left half, prompts and an adapter."""
    folder = tmp_path / "given"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / "room.png")
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    mask.save(folder / "mask.png")
    (folder / "prompts.toml").write_text('[[prompts]]\nprompt = "b"\nseed = 7\nwidth = 40\nheight = 24')
    write_adapter(made(), folder / "a.safetensors", format="kohya", family=sd.tiny())
    return folder


def draw(out: Path, *arguments: object) -> list[Path]:
    main(["sample", str(sd.tiny().path), "--steps", "2", "--out", str(out), *map(str, arguments)])
    return sorted(out.glob("*"))


def text(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["lorakit"])  # type: ignore[attr-defined, no-any-return]


def test_prompts_from_a_file_come_after_those_of_the_command_and_each_may_be_drawn_often(
    given: Path, tmp_path: Path
) -> None:
    files = draw(tmp_path / "o", "--prompt", "a", "--prompts", given / "prompts.toml", "--count", 2, "--size", "32x32")
    said = [text(file) for file in files]
    assert [(s["prompt"], s["seed"], s["width"], s["height"]) for s in said] == [
        ("a", 0, 32, 32),
        ("a", 1, 32, 32),
        ("b", 7, 40, 24),
        ("b", 8, 40, 24),
    ]
    assert all(Image.open(file).size == (s["width"], s["height"]) for file, s in zip(files, said, strict=True))


def test_a_picture_says_how_it_was_drawn_so_that_it_can_be_drawn_again(given: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a", "--negative", "b", "--seed", 5, "--guidance", 3.0, "--image", given / "room.png"]
    arguments += ["--strength", 0.75, "--adapter", f"{given}/a.safetensors:0.5"]
    (file,) = draw(tmp_path / "o", *arguments)
    said = text(file)
    assert said == {
        "prompt": "a",
        "negative_prompt": "b",
        "seed": 5,
        "width": 40,
        "height": 32,
        "strength": 0.75,
        "steps": 2,
        "guidance": 3.0,
        "sampler": "DDIMScheduler",
        "base": sd.tiny().path.name,
        "adapters": [{"file": "a.safetensors", "weight": 0.5, "sha256": sha256_file(given / "a.safetensors")}],
        "precision": "fp32",
        "image": "room.png",
    }
    held = file.read_bytes().decode("latin-1")
    assert not any(word in held for word in (str(tmp_path), f"/{getpass.getuser()}/", socket.gethostname()))


def test_adapters_and_the_picture_that_is_drawn_over_are_seen(given: Path, tmp_path: Path) -> None:
    over = ["--prompt", "a", "--image", given / "room.png"]
    plain = pixels(draw(tmp_path / "1", *over)[0])
    assert plain.shape == (32, 40, 3)
    changed = pixels(draw(tmp_path / "2", *over, "--adapter", given / "a.safetensors")[0])
    assert not np.array_equal(plain, changed)
    masked, room = pixels(draw(tmp_path / "3", *over, "--mask", given / "mask.png")[0]), pixels(given / "room.png")
    assert np.array_equal(masked[:, 20:], room[:, 20:])
    assert not np.array_equal(masked[:, :20], room[:, :20])


def test_the_size_is_that_asked_for_else_the_pictures_own_as_far_as_it_can_be_drawn(
    given: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.png"
    Image.open(given / "room.png").resize((45, 35)).save(odd)
    over = ["--prompt", "a", "--image", odd]
    sizes = [Image.open(draw(tmp_path / "o", *over, *size)[-1]).size for size in ([], ["--size", "24x48"])]
    assert sizes == [(40, 32), (24, 48)]
    with pytest.raises(SystemExit):
        Image.new("RGB", (45, 5)).save(odd)
        draw(tmp_path / "o", *over)


def test_upscaling_draws_over_what_was_drawn_or_given(given: Path, tmp_path: Path) -> None:
    asked = ["--prompt", "a", "--strength", "0.5", "--upscale", "2"]
    (small,) = draw(tmp_path / "1", "--prompt", "a", "--size", "32x24")
    (at_once,) = draw(tmp_path / "2", *asked, "--size", "32x24")
    (given_small,) = draw(tmp_path / "3", *asked, "--image", small)
    (other,) = draw(tmp_path / "4", *asked, "--image", given / "room.png", "--size", "32x24")
    assert (text(at_once)["upscale"], text(at_once)["width"], text(at_once)["height"]) == (2, 64, 48)
    assert pixels(at_once).shape == (48, 64, 3)
    assert np.abs(pixels(at_once) - pixels(given_small)).mean() < 1, "enlarged by Pillow or by torch"
    assert np.abs(pixels(at_once) - pixels(other)).mean() > 5


def test_what_a_family_has_no_pipeline_for_is_refused_by_name(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sd.StableDiffusion, "tasks", {"text": {"text": "StableDiffusionPipeline"}})
    over = ["--image", given / "room.png"]
    for arguments, said in (
        (over, "--image: the family sd has no"),
        ([*over, "--mask", given / "mask.png"], "--image with --mask: the family sd has no"),
        (["--upscale", 2, "--strength", 1], "--upscale: the family sd has no"),
    ):
        with pytest.raises(SystemExit):
            draw(tmp_path / "o", "--prompt", "a", *arguments)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--size", "33x32"], "width 33 (by --size or --prompts): it must be a multiple of 8"),
        (["--size", "big"], "--size big"),
        (["--steps", "0"], "--steps"),
        (["--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--family", "sdd"], "Did you mean sd?"),
        (["--count", "0"], "--count"),
        (["--prompts", "nowhere.toml"], "--prompts nowhere.toml cannot be read"),
        (["--mask", "m.png"], "--mask says what of a picture is drawn: give --image too"),
        (["--strength", "0.5"], "--strength is for what is drawn over"),
        (["--image", "nowhere.png"], "--image nowhere.png cannot be read"),
        (["--image", "a.png", "--strength", "1.5"], "--strength 1.5"),
        (["--image", "a.png", "--strength", "0.01"], "--strength 0.01 of --steps 20 leaves no step"),
        (["--upscale", "0"], "--upscale 0"),
        (["--upscale", "1"], "--upscale 1: give a whole number from 2 on"),
        (["--guidance", "-1"], "--guidance -1: give a number from 0 on"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--guidance", "1", "--negative", "x"], "has no effect with --guidance 1"),
        (["--assume-alpha", "4"], "--assume-alpha is for adapter files"),
        (["--image", "a.png", "--mask", "m.png", "--upscale", "2"], "--upscale draws the whole picture"),
    ],
)
def test_bad_input(arguments: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(sd.tiny().path), "--prompt", "a", "--out", str(out), *arguments])
    assert caught.value.code == 2
    assert wanted in capsys.readouterr().err
    assert not out.exists()


def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(sd.tiny().path), "--out", str(tmp_path / "o")])
    assert "give --prompt or --prompts" in capsys.readouterr().err


def test_two_processes_draw_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    drawn, how = pictures.draw, ["--upscale", "2", "--strength", "0.5"]
    how += [word for prompt in "aabba" for word in ("--prompt", prompt)]

    def draw(pipeline: Any, wanted: Any, **rest: Any) -> Any:
        (tmp_path / f"drawn-{wanted[0].seed}").write_text(os.environ.get("RANK", "alone"))
        return drawn(pipeline, wanted, **rest)

    monkeypatch.setattr("lorakit.verbs.sample.draw", draw)
    for folder in ("one", "two"):
        make_folder(tmp_path / folder)
        (tmp_path / folder / "0003.png").touch()
    sample(tmp_path / "one", *how)
    alone = capfd.readouterr().out
    assert in_processes(2, lambda: sample(tmp_path / "two", *how)) == [0, 0]
    assert capfd.readouterr().out == alone.replace("one/", "two/") and alone.count(".png") == 5
    assert [(tmp_path / f"drawn-{i}").read_text() for i in range(5)] == ["0", "1", "0", "1", "0"]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["0003.png", "0004.png", "0005.png", "0006.png", "0007.png", "0008.png"]
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len({(tmp_path / "one" / name).read_bytes() for name in files}) == 6
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_picture_that_fails_on_one_process_ends_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    drawn = pictures.draw

    def draw(pipeline: Any, wanted: Any, **rest: Any) -> Any:
        if wanted[0].prompt == "too large":
            raise torch.OutOfMemoryError("no memory")
        return drawn(pipeline, wanted, **rest)

    monkeypatch.setattr("lorakit.verbs.sample.draw", draw)
    asked = [word for prompt in ("a", "b", "c", "too large", "d") for word in ("--prompt", prompt)]
    assert in_processes(2, lambda: sample(tmp_path / "out", *asked)) == [2, 2]
    said = capfd.readouterr()
    assert said.err.count("error: ") == 1 and "'too large'" in said.err and "--size" in said.err
    assert "Traceback" not in said.err and said.out == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]
