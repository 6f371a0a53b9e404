"""report.html: all in one file, nothing personal, and each number under its own heading."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.core.errors import InputError
from lorakit.training.report import write_report
from lorakit.training.validation import BAND_NAMES, Measured, record


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def written(run: Path, **options: Any) -> str:
    write_report(run, **{"prompts": [], "recipe": "", **options})
    return (run / "report.html").read_text()


def cards(page: str) -> dict[str, str]:
    """The charts by their headings."""
    return dict(re.findall(r"<h3>([^<]+)</h3>(.*?)(?=<h3>|</section>)", page, re.DOTALL))


def measured(loss: float, *, sources: tuple[str, ...] = ("0", "1")) -> Measured:
    return Measured(loss, 8, {key: loss + int(key) for key in sources}, dict.fromkeys(BAND_NAMES, loss))


def test_one_file_with_curves_samples_and_recipe(tmp_path: Path) -> None:
    run = tmp_path / "my <run>"
    (run / "samples" / "step-000002").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "step-000002" / "00.png")
    records = [{"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 1e-4, "seconds": 2.0} for s in (1, 2, 3)]
    records[1] |= {"loss": None, "skipped": True}
    lines(run / "metrics.jsonl", records)
    page = written(run, prompts=["a <b> thing"], recipe="[run]\nsteps = 3\n")
    assert list(cards(page)) == ["Loss", "Gradient norm, before clipping", "Learning rate"] and page.count("<img") == 1
    assert "a &lt;b&gt; thing" in page and "my &lt;run&gt;" in page and "steps = 3" in page and "Hardest" not in page
    assert "steps skipped</span><strong>1<" in page and "6 s" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "url(" not in page, "nothing is loaded from elsewhere"
    assert str(tmp_path) not in page


def test_what_is_measured_stands_under_its_own_heading(tmp_path: Path) -> None:
    (tmp_path / "check.json").write_text(json.dumps({"sources": [{"folder": "cats"}, {"folder": "<dogs>"}]}))
    found = [
        record(step, {"held_out": measured(1 / step), "training": measured(0.5 / step, sources=("0",))}, seconds=1.0)
        for step in (1, 2, 4)
    ]
    lines(tmp_path / "validation.jsonl", found)
    page = written(tmp_path)
    shown = cards(page)
    assert list(shown) == [
        "Validation",
        "Training pictures minus those put aside",
        "By timestep: pictures put aside",
        "By source: pictures put aside",
        "By timestep: training pictures",
    ]
    assert [shown[title].count("<polyline") for title in shown] == [2, 1, 4, 2, 4]
    assert "pictures put aside</b>" in shown["Validation"] and "learned by heart" in page
    assert "0 cats" in page and "1 &lt;dogs&gt;" in page
    assert "validation loss at the end</span><strong>0.25<" in page and "its lowest, at step 4" in page


def test_training_pictures_are_not_passed_off_as_others(tmp_path: Path) -> None:
    lines(tmp_path / "validation.jsonl", [record(s, {"training": measured(1.0)}, seconds=1.0) for s in (0, 1)])
    page = written(tmp_path)
    assert "validation loss" not in page and "training loss at the end" in page
    assert "show over-fitting less" in page and "minus" not in page and "put aside</b>" not in page


def test_the_hardest_pictures_are_shown_as_far_as_they_can_be(tmp_path: Path) -> None:
    names = ["0/<easy>.png", "0/hard.png", "0/gone.png"]
    records = [
        {"step": s, "loss": 1.0, "samples": names, "timesteps": [s, s, s], "losses": [0.5, 2.0, 0.5]} for s in range(60)
    ]
    lines(tmp_path / "metrics.jsonl", records)

    def thumbnail(key: str) -> Image.Image:
        if "gone" in key:
            raise InputError(f"{tmp_path}/{key} was changed")
        return Image.new("RGB", (4, 4))

    page = written(tmp_path, thumbnail=thumbnail)
    rows = re.findall(r"<tr><td>.*?</tr>", page)
    assert "0/hard.png" in rows[0] and re.search(r">(1\.9|2\.0)", rows[0]) and ">60<" in rows[0] and len(rows) == 3
    assert page.count("<img") == 2 and "0/&lt;easy&gt;.png" in page and str(tmp_path) not in page


def test_a_file_with_odd_lines_and_pictures_gives_a_report_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "samples" / "step-000002").mkdir(parents=True)
    (tmp_path / "samples" / "step-000002" / "best.png").write_bytes(b"my own")
    assert "0 steps" in written(tmp_path), "a disk that was full all the time"
    good = [json.dumps({"step": s, "loss": 0.5}).encode() for s in (1, 2)]
    odd = [b"\0" * 9, b'{"step": 1, "lo', b"7", b"\xff", b'{"loss": 0.5}', b'{"step": 3, "loss": NaN}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *odd, good[1]]))
    (tmp_path / "validation.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "measured": "held_out"}\n')
    page = written(tmp_path)
    assert "3 steps" in page and list(cards(page)) == ["Loss"] and "nan" not in page.partition("<main>")[2]
    assert "<img" not in page
