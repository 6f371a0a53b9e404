"""report.html: all in one file, nothing personal, curves where the numbers say."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from lorakit.training.report import curve, running_mean, write_report


def test_one_file_with_curves_samples_and_recipe(tmp_path: Path) -> None:
    run = tmp_path / "my <run>"
    (run / "samples" / "step-000002").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "step-000002" / "00.png")
    records = [{"step": s, "loss": 1 / s, "grad_norm": 1.0, "lr": 1e-4} for s in (1, 2, 3)]
    records[1]["loss"] = None  # type: ignore[typeddict-item]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(run, prompts=["a <b> thing"], recipe="[run]\nsteps = 3\n")
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 3 and page.count("<img") == 1
    assert "a &lt;b&gt; thing" in page and "my &lt;run&gt;" in page and "steps = 3" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert str(tmp_path) not in page


def test_a_file_with_odd_lines_and_pictures_gives_a_report_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "samples" / "step-000002").mkdir(parents=True)
    (tmp_path / "samples" / "step-000002" / "best.png").write_bytes(b"my own")
    write_report(tmp_path, prompts=[], recipe="")  # a disk that was full all the time
    assert "0 steps." in (tmp_path / "report.html").read_text()
    good = [json.dumps({"step": s, "loss": 0.5}).encode() for s in (1, 2)]
    odd = [b"\0" * 9, b'{"step": 1, "lo', b"7", b"\xff", b'{"loss": 0.5}', b'{"step": 3, "loss": NaN}', b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *odd, good[1]]))
    write_report(tmp_path, prompts=[], recipe="")
    page = (tmp_path / "report.html").read_text()
    assert "3 steps." in page and page.count("<svg") == 1 and "nan" not in page and "<img" not in page


def test_a_curve_spans_its_frame() -> None:
    xs_ys = re.search(r'points="([^"]+)"', curve([(1, 5.0), (2, 1.0), (3, 3.0)], smooth=False))
    assert xs_ys is not None
    points = [tuple(map(float, pair.split(","))) for pair in xs_ys[1].split()]
    assert points == [(60.0, 10.0), (455.0, 190.0), (850.0, 100.0)]


def test_the_running_mean_forgets_what_left_its_window() -> None:
    values = [float(i) for i in range(40)]
    means = running_mean(list(enumerate(values)))
    assert [m for _, m in means] == pytest.approx([0.0] + [(a + b) / 2 for a, b in pairwise(values)])
