"""`lorakit check`: every fault by name, on any terminal, and nothing of the user's touched."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from lorakit.cli import check as module
from lorakit.cli.main import main
from lorakit.data.report import DataReport, SourceReport
from lorakit.families import sd
from tests.verbs import messy
from tests.verbs.conftest import write_pictures


class Done(NamedTuple):
    code: int
    out: str
    err: str


Check = Callable[..., Done]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\npath = "{sd.tiny().path}"\n[[data.sources]]\npath = "photos"\n[data]\ncache = "cache"\n'
        '[data.buckets]\nresolution = 64\n[run]\noutput = "run"\nsteps = 10\nbatch_size = 2\nprecision = "fp32"\n'
    )
    return path


@pytest.fixture
def check(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(*words: str) -> Done:
        code = 0
        try:
            main(["check", str(recipe), *words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Done(code, out, err)

    return run


def error_of(done: Done) -> str:
    assert done.err.count("error: ") == 1
    return done.err[done.err.index("error: ") :]


def test_a_messy_folder_every_fault_by_name_and_mended_it_is_ready(check: Check, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    messy.make(photos)
    before = messy.fingerprint(photos)
    done = check("--out", str(tmp_path / "out"))
    assert done.code == 2
    message = error_of(done)
    for name, word in messy.WRONG.items():
        lines = [line for line in message.splitlines() if name in line and word in line]
        assert lines, f"{name}: {word}\n{message}"
    assert len(message.splitlines()) == len(messy.WRONG)
    assert "photos" in done.out  # the table all the same
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == ["check.html", "check.json", "contact-sheet.png"], "what is good can be looked at"
    assert not any(str(tmp_path) in written[name].read_text() for name in ("check.html", "check.json"))
    assert messy.fingerprint(photos) == before
    assert len(json.loads((tmp_path / "out" / "check.json").read_text())["errors"]) == len(messy.WRONG)

    messy.mend(photos)
    before = messy.fingerprint(photos)
    done = check("--out", str(tmp_path / "out"))
    assert done.code == 0, done.err
    for name, word in messy.WORTH_A_LOOK.items():
        assert any(name in line and word in line for line in done.out.splitlines()), f"{name}: {word}\n{done.out}"
    alike = [line for line in done.out.splitlines() if "looks like" in line]
    assert len(alike) == 1 and "near.jpg" in alike[0]
    assert "Ready to train" in done.out and "\x1b" not in done.out
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["check.html", "check.json", "contact-sheet.png"]
    assert Image.open(files["contact-sheet.png"]).width > 500
    page = files["check.html"].read_text()
    for name in ("0/new\\nline.png", "0/\U0001f600.png", "0/[bold red]loud.png", "0/\\x1b[31mred.png"):
        assert f"<td class=key>{name}</td>" in page
    assert page.count("<td class=key>") == 15
    report = json.loads(files["check.json"].read_text())
    assert (report["pictures"], report["duplicates"], len(report["unused"])) == (15, 2, 1)
    # nothing of the user's is touched or told
    assert messy.fingerprint(photos) == before
    assert str(tmp_path) not in page and str(tmp_path) not in files["check.json"].read_text()
    assert not (tmp_path / "run").exists()


def test_json_is_all_there_is_on_stdout(check: Check, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 5)
    done = check("--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["pictures"] == 5 and report["errors"] == []
    assert (report["steps"], report["steps_per_epoch"], report["epochs"]) == (10, 3, 3.3333)
    (photos / "02.txt").unlink()
    done = check("--json")
    assert done.code == 2 and len(json.loads(done.out)["errors"]) == 1 and "02.png" in error_of(done)
    done = check("--json", "data.buckets.resolutoin=3")
    assert done.code == 2 and "Did you mean resolution?" in json.loads(done.out)["errors"][0]


def test_the_report_is_the_one_that_a_training_keeps(check: Check, recipe: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 3)
    report = json.loads(check("--json", "run.steps=1").out)
    main(["train", str(recipe), "run.steps=1"])
    assert json.loads((tmp_path / "run" / "check.json").read_text()) == report


def test_all_that_is_wrong_at_once(check: Check, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 3)
    (photos / "00.txt").unlink()
    message = error_of(check("model.path=/no/such", "--out", str(photos / "out"), f"run.output={photos}/run"))
    for wanted in ("--out", "run.output", "/no/such", "00.png"):
        assert wanted in message
    assert sorted(path.name for path in photos.iterdir()) == ["00.png", "01.png", "01.txt", "02.png", "02.txt"]


def test_settings_that_change_nothing_for_these_data(check: Check, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 4)
    source = ("data.sources.0.mask_floor=0.5", 'data.sources.0.crop="focus"')
    said = ("data.sources.0.mask_floor has no", 'data.sources.0.crop = "focus" has no', "run.validate_every = 7 has no")
    done = check(*source, "run.validate_every=7")
    assert done.code == 0 and all(done.out.count(text) == 1 for text in said)
    assert "effect" not in check().out
    assert said[2] not in check("run.validate_every=7", "run.validate_training=1").out
    assert said[2] not in check("run.validate_every=7", "data.validation=0.5").out
    (photos / "00.json").write_text('{"focus": [1, 1, 2, 2]}')
    out = check(*source).out
    assert said[0] in out and said[1] not in out
    with Image.open(photos / "00.png") as picture:
        Image.new("L", picture.size, 255).save(photos / "00.mask.png")
    (photos / "00.json").unlink()
    assert "effect" not in check(*source).out


def test_what_cannot_be_written_to(check: Check, tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 3)
    (tmp_path / "file").write_text("mine")
    done = check("--out", str(tmp_path / "file"))
    assert done.code == 2 and "name a folder" in error_of(done)
    assert (tmp_path / "file").read_text() == "mine"
    assert check("--originals", "0").code == 2


def test_a_sheet_of_an_earlier_check_does_not_stay_beside_errors(check: Check, tmp_path: Path) -> None:
    photos = write_pictures(tmp_path / "photos", 3)
    assert check("--out", str(tmp_path / "out"), "--originals", "2").code == 0
    assert (tmp_path / "out" / "check.html").read_text().count("<figure>") == 2
    for path in photos.iterdir():
        path.write_text("no picture")
    assert check("--out", str(tmp_path / "out")).code == 2
    assert not (tmp_path / "out" / "contact-sheet.png").exists()


def test_no_weights_are_read(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "photos", 3)

    def load(*args: object, **settings: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("lorakit.families.load_settings", load)
    monkeypatch.setattr("safetensors.safe_open", load)
    assert check().code == 0


# -- on any terminal ----------------------------------------------------------------------------------------------

EVIL = "[bold red]x[/bold red]\x1b[2J\nline"


def report_of(**changes: object) -> DataReport:
    values = {
        "sources": (
            SourceReport(f"photos {EVIL}", "train", 9, 1, 9.0),
            SourceReport("more", "train", 1, 1, 1.0, 0, 5, 9),
        ),
        "buckets": {f"{64 + 8 * i}×64": i + 1 for i in range(40)},
        "warnings": (f"0/{EVIL}.png: is odd", *(f"0/{i}.png: {'long ' * 50}" for i in range(49))),
        "skipped": ("0/bad.png: it is damaged",),
        "pictures": 10,
        "steps": 20,
        "steps_per_epoch": 5,
        "epochs": 4.0,
    }
    return DataReport(**{**values, **changes})


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("colours", [True, False])
def test_any_width_with_and_without_colours(
    width: int, colours: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
    module.show(report_of(), title=f"{EVIL}.toml")
    out = capsys.readouterr().out
    assert ("\x1b[" in out) == colours and "\x1b[2J" not in out
    assert "  0/[bold red]x[/bold red]\\x1b[2J\\nline.png: is odd\n" in out  # as it stands
    assert "and 30 more: --json or --out shows all" in out
    assert "and 10 more" in out and "Ready to train" in out


def test_lists_are_not_broken_into_lines_so_that_they_can_be_searched(capsys: pytest.CaptureFixture[str]) -> None:
    module.show(report_of())
    assert f"  0/0.png: {'long ' * 50}".rstrip() in capsys.readouterr().out


def test_an_output_that_knows_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    module.show(report_of())
    sys.stdout.flush()
    assert b"####" in raw.getvalue()


def test_it_does_not_say_ready_where_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    module.show(report_of(errors=("no",)))
    assert "Ready" not in capsys.readouterr().out
    module.show(DataReport(errors=("no",)))  # nothing could be found out
    assert "pictures" in capsys.readouterr().out


def test_errors_are_counted_and_pictures_are_said_to_be_left_out_only_where_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows_of(report: DataReport) -> list[list[str]]:
        module.show(report)
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    found = rows_of(report_of(errors=("no", "nor this"), skipped=()))
    assert ["errors", "2"] in found and not any(row[:1] == ["bad"] for row in found)
    found = rows_of(report_of())
    assert ["bad", "pictures", "1", "left", "out"] in found and not any(row[:1] == ["errors"] for row in found)


def test_what_is_cut_off_is_said_of_the_whole_picture(capsys: pytest.CaptureFixture[str]) -> None:
    module.show(report_of(mean_crop=0.051, largest_crop=0.25))  # at either side, were it cut evenly
    out = capsys.readouterr().out
    assert "10.2% of width or height on average, 50.0% at most" in out and "two sides" not in out
