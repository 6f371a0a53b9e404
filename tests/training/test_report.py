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


def test_a_curve_spans_its_frame() -> None:
    xs_ys = re.search(r'points="([^"]+)"', curve([(1, 5.0), (2, 1.0), (3, 3.0)], smooth=False))
    assert xs_ys is not None
    points = [tuple(map(float, pair.split(","))) for pair in xs_ys[1].split()]
    assert points == [(60.0, 10.0), (455.0, 190.0), (850.0, 100.0)]


def test_the_running_mean_forgets_what_left_its_window() -> None:
    values = [float(i) for i in range(40)]
    means = running_mean(list(enumerate(values)))
    assert [m for _, m in means] == pytest.approx([0.0] + [(a + b) / 2 for a, b in pairwise(values)])
