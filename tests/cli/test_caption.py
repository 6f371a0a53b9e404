"""`lorakit caption` from the command line: what it prints, what it ends with, what it says of bad input."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.captioning import load_writers, validate_settings
from lorakit.captioning.pictures import Picture
from lorakit.cli.main import main
from lorakit.core import files
from lorakit.families import sd
from tests.captioning.tiny_models import qwen2_vl
from tests.verbs.conftest import write_pictures

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "photos", 3)
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


@pytest.fixture
def run(photos: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout and stderr of `lorakit caption photos …`."""

    def run(*words: str, folder: Path = photos) -> tuple[int, str, str]:
        code = 0
        try:
            main(["caption", str(folder), *words])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert said.err.count("error: ") == bool(code) and "Traceback" not in said.err
        return code, said.out, said.err

    return run


def test_templates_settings_files_and_overrides(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('template = "a {folder}"\nprefix = "qzx"\nreplace = [["a ", "an "]]\n')
    code, out, _ = run("--recipe", str(tmp_path / "c.toml"), "--suffix", "here", "plain_names=false")
    assert code == 0 and "captions of 3 pictures written" in out
    assert (photos / "01.txt").read_text() == "qzx an photos here\n"
    code, out, _ = run("--template", "x")
    assert code == 0 and "0 pictures written, 3 had some already" in out
    (photos / "00.txt").write_text(" \n")
    (photos / "02.txt").write_text("")
    code, out, _ = run("--template", "x")
    assert code == 0 and "0 pictures written, 1 had some already\nEmpty text files" in out
    assert "refuses: 00.txt, 02.txt. Write" in out
    code, out, _ = run("--template", "x", "--overwrite")
    assert code == 0 and "Empty" not in out and ".captions-undo-" in out and (photos / "01.txt").read_text() == "x\n"


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}")
def test_what_a_model_says_of_photographs_reaches_the_files(run: Run, tmp_path: Path) -> None:
    folder, model = tmp_path / "pets", qwen2_vl(tmp_path / "model")
    for i, photo in enumerate(sorted((PHOTOS / "dog").glob("*.jpg"))[:3]):
        (folder / str(i)).mkdir(parents=True)
        shutil.copyfile(photo, folder / str(i) / photo.name)
    words = ["--model", str(model), "--max-tokens", "9", "--style", "subject", "--trigger", "qzx", "--combine"]
    code, out, _ = run(
        *words, "--prefix", "qzx,", "--replace", "a", "A", "longest=128", "combine.longest=64", folder=folder
    )
    assert code == 0 and "captions of 3 pictures written" in out
    how = {"model": str(model), "max_tokens": 9, "styles": ["subject"], "trigger": "qzx", "longest": 128}
    tags = {"model": str(model), "styles": ["tags"], "longest": 64}
    settings = validate_settings({**how, "combine": tags, "prefix": "qzx,", "replace": [["a", "A"]]})
    write = load_writers(settings, root=folder, device="cpu")
    said = [write([Picture(file.name, file.read_bytes)])[0] for file in sorted(folder.rglob("*.jpg"))]
    assert [file.read_text() for file in sorted(folder.rglob("*.txt"))] == [f"{text}\n" for (text,) in said]
    assert len(set(said)) == 3 and all(text.startswith("qzx, ") for (text,) in said)


def test_combined_writers(run: Run, photos: Path) -> None:
    assert run("--template", "a photo", "combine.template={name}", "combine.suffix=!")[0] == 0
    assert (photos / "01.txt").read_text() == "a photo, 01 !\n"


def test_pictures_that_could_not_be_captioned_are_named_at_the_end(run: Run, photos: Path) -> None:
    (photos / "01.png").write_bytes(b"x")
    code, out, err = run("--template", "{exif.Artist=someone}")
    assert code == 2 and "captions of 2 pictures" in out and "01.png: it is damaged" in err
    assert sorted(p.name for p in photos.glob("*.txt")) == ["00.txt", "02.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a model"),
        (["--model", "nowhere"], "model = nowhere does not exist"),
        (["--model", "{draws}"], "a model that draws pictures"),
        (["--model", "{photos}"], "neither config.json"),
        (["--kind", "vlmm", "--model", "{photos}"], "Did you mean vlm?"),
        (["--template", "x", "--max-tokens", "3"], "max_tokens is not a setting of template"),
        (["--template", "x", "=1"], "no override"),
        (["--recipe", "none.toml"], "none.toml cannot be read"),
    ],
)
def test_bad_input_is_one_message(run: Run, photos: Path, words: list[str], said: str) -> None:
    places = {"{draws}": str(sd.tiny().path), "{photos}": str(photos)}
    code, _, err = run(*(places.get(word, word) for word in words))
    assert code == 2 and said in err
    assert not list(photos.glob("*.txt"))


def test_no_folder_and_no_pictures(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "holds no pictures"), ("none", "does not exist")):
        code, _, err = run("--template", "x", folder=tmp_path / name)
        assert code == 2 and said in err


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only")])
def test_a_full_disk_and_a_read_only_one(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    replace = files.os.replace

    def refuse(source: str, target: str) -> None:
        if Path(target).name == "01.txt":
            raise OSError(number, "no")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    code, _, err = run("--template", "x")
    assert code == 4 and said in err and "01.txt" in err
    assert [p.name for p in photos.iterdir() if p.suffix not in (".png",)] == ["00.txt"], "what was written stays"
