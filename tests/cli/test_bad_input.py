"""Every way to give wrong input: one message that names what and where, the exit code of the contract, nothing left."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.core import files
from lorakit.families import sd
from lorakit.training import checkpoint
from tests.verbs.conftest import write_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "photos", 3)


@pytest.fixture
def recipe(tmp_path: Path, photos: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\npath = "{sd.tiny().path}"\n[[data.sources]]\npath = "photos"\n[data]\ncache = "cache"\n'
        '[data.buckets]\nresolution = 32\n[run]\noutput = "run"\nsteps = 1\nbatch_size = 1\nprecision = "fp32"\n'
    )
    return path


Fail = Callable[..., str]


@pytest.fixture
def fail(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Trains, expects the exit code, and gives the message; the folder of the run must not have come about."""

    def run(*overrides: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["train", str(recipe), *overrides])
        message = capsys.readouterr().err
        assert caught.value.code == code, message
        assert message.startswith("error: ") or "\nerror: " in message
        assert message.count("error: ") == 1 and "Traceback" not in message
        assert not (tmp_path / "run").exists()
        return message

    return run


def test_no_such_folder_and_no_pictures(fail: Fail, tmp_path: Path) -> None:
    assert "nowhere" in fail(f"data.sources.0.path={tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in fail(f"data.sources.0.path={tmp_path}/empty")


def test_unreadable_pictures_are_all_named(fail: Fail, photos: Path) -> None:
    (photos / "00.png").write_bytes(b"no picture")
    whole = (photos / "01.png").read_bytes()
    (photos / "01.png").write_bytes(whole[: len(whole) // 2])
    message = fail()
    assert "00.png" in message and "01.png" in message


def test_a_missing_caption(fail: Fail, photos: Path) -> None:
    (photos / "02.txt").unlink()
    message = fail()
    assert "02.png" in message and "caption" in message


def test_pictures_that_are_too_small(fail: Fail) -> None:
    message = fail("data.buckets.resolution=256")
    assert "too small" in message and "00.png" in message and "data.buckets.resolution" in message


def test_a_resolution_that_does_not_fit_the_vae(fail: Fail) -> None:
    message = fail("data.buckets.resolution=33")
    assert "data.buckets.resolution" in message and "multiple of 4" in message


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("adapter.rnak=4", "Did you mean rank?"),
        ("adapter.rank=four", "adapter.rank = 'four'"),
        ("adapter.rank=1.5", "adapter.rank = 1.5"),
        ("adapter.rank=100000", "adapter.rank = 100000 is more than any of its layers has"),
        ("optimizer.lr='1e-4'", "optimizer.lr = '1e-4'"),
        ("adapter.targets=['to_qq']", "adapter.targets"),
        ("model.family=sdd", "Did you mean sd?"),
        ("nosuch.key=1", "nosuch is not a section"),
        ("data.sources.0.repeats=0", "data.sources.0.repeats"),
    ],
)
def test_wrong_keys_values_and_kinds(fail: Fail, override: str, wanted: str) -> None:
    assert wanted in fail(override)


def test_training_sources_that_count_for_nothing(fail: Fail) -> None:
    assert "give a training source a weight above 0" in fail("data.sources.0.weight=0")


def test_more_steps_than_the_scheduler_has(fail: Fail, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sample.steps = 1001: the model draws in 1000 steps at most" in fail(
        "sample.prompts=['a']", "run.sample_every=1", "sample.steps=1001"
    )
    out = tmp_path / "drawn"
    with pytest.raises(SystemExit):
        main(["sample", str(sd.tiny().path), "--prompt", "a", "--steps", "1001", "--out", str(out)])
    assert "--steps = 1001: the model draws in 1000 steps at most" in capsys.readouterr().err and not out.exists()


def test_a_base_that_lacks_a_component_or_holds_pickles(fail: Fail, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd.tiny().path, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    shutil.rmtree(model / "vae")
    message = fail(f"model.path={model}")
    assert "pickle" in message and "lacks the component vae" in message


def test_a_pickled_checkpoint(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "pickle" in fail(f"model.path={tmp_path}/model.ckpt")


def test_an_output_folder_in_use(fail: Fail, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text("mine")
    message = fail(f"run.output={used}")
    assert "holds a run already" in message and "remove this one" in message
    assert [p.name for p in used.iterdir()] == ["metrics.jsonl"]


def test_an_output_folder_among_the_pictures(fail: Fail, photos: Path) -> None:
    before = sorted(photos.iterdir())
    for output in (photos, photos / "runs" / "x"):
        assert "run.output" in fail(f"run.output={output}")
    assert sorted(photos.iterdir()) == before


def test_model_data_and_output_are_told_of_at_once(fail: Fail, photos: Path, tmp_path: Path) -> None:
    (photos / "00.txt").unlink()
    used = tmp_path / "used"
    used.mkdir()
    (used / "metrics.jsonl").touch()
    message = fail("model.path=/no/such/model", f"run.output={used}")
    assert "model.path" in message and "00.png" in message and "run.output" in message


def test_a_cache_among_the_pictures(fail: Fail, photos: Path) -> None:
    before = sorted(photos.iterdir())
    assert "data.cache" in fail(f"data.cache={photos}/cache")
    assert sorted(photos.iterdir()) == before


def test_a_cache_that_is_a_file(fail: Fail, recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = f"error: data.cache = {tmp_path}/file is a file: give a folder.\n"
    assert said in fail(f"data.cache={tmp_path}/file") and said in fail("--dry-run", f"data.cache={tmp_path}/file")
    below = fail(f"data.cache={tmp_path}/file/cache")
    assert f"error: data.cache = {tmp_path}/file/cache: file in it is a file: give a folder.\n" in below
    for verb in ("check", "cache"):
        with pytest.raises(SystemExit) as caught:
            main([verb, str(recipe), f"data.cache={tmp_path}/file"])
        told = capsys.readouterr()
        assert caught.value.code == 2 and said in told.err and "Ready to train" not in told.out


def test_control_characters_in_names_are_escaped(fail: Fail, photos: Path) -> None:
    (photos / "\x1b[31mred\n.png").write_bytes(b"no picture")
    (photos / "\x1b[31mred\n.txt").write_text("x")
    message = fail()
    assert "\x1b" not in message and "\\x1b[31mred\\n.png" in message


def test_a_full_disk_is_exit_4_and_leaves_no_litter(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = files.os.replace

    def full(source: str, target: str) -> None:
        if "adapter" in Path(target).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe)])
    assert caught.value.code == 4
    message = capsys.readouterr().err
    assert "the disk is full" in message and "Traceback" not in message
    run = tmp_path / "run"
    assert not list(run.rglob("*.tmp")) and not (run / "adapter.safetensors").exists()
    assert checkpoint.damage(run / "checkpoints" / "step-000001") is None, "what could be written is whole"
    assert '"code": 4' in (run / "exit.json").read_text()


def test_a_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(tmp_path / "none.toml")])
    assert caught.value.code == 2 and "none.toml" in capsys.readouterr().err


def test_neither_recipe_nor_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train"])
    assert caught.value.code == 2 and "--resume RUN" in capsys.readouterr().err
