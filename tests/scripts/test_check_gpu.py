"""The check of a GPU, on the CPU: there every promise holds, and one that does not is seen."""

from pathlib import Path

import check_gpu
import pytest

from lorakit.families import sd
from tests.verbs.conftest import write_pictures

EQUAL = {"order": True, "lr": True, "noise, t": True, "scale": True}


@pytest.mark.slow
def test_everything_is_kept_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos = write_pictures(tmp_path / "photos", 5)
    words = ["--precision", "--compute", "int8", "--steps", "6", "--data", str(photos)]  # bf16, deterministic
    assert check_gpu.main([*words, "--model", str(sd.tiny().path), "--json", str(tmp_path / "table.json")]) == 0
    shown = capfd.readouterr().out
    assert "\nbf16 int8 " in shown and shown.count("same bits  same bits") == 1 and "DIFFER" not in shown
    assert (tmp_path / "table.json").exists()


@pytest.mark.gpu
@pytest.mark.slow
def test_everything_is_kept_on_this_gpu() -> None:
    assert check_gpu.main(["--steps", "12"]) == 0


def test_what_is_not_kept_is_named() -> None:
    good = check_gpu.Row("bf16", True, EQUAL, None, None, 1.0)
    assert good.broken(always=True) == []
    loose = check_gpu.Row("bf16", False, EQUAL, 1e-6, 1e-6, 1.0)
    assert loose.broken(always=False) == [] and loose.broken(always=True) == ["weights"]
    bad = check_gpu.Row("fp16", True, {**EQUAL, "noise, t": False}, 1e-3, None, 31.0)
    assert bad.broken(always=False) == ["noise, t", "weights", "stops in"]
    shown = check_gpu.table([good, bad], device="GPU")
    assert shown.count("DIFFER") == 1 and "1.0e-03" in shown


def test_a_sample_that_is_drawn_twice_otherwise_equals_no_other(tmp_path: Path) -> None:
    """Before the kill one noise, after it another: the later one alone would hide it."""
    runs = check_gpu.Runs(tmp_path, {})
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"scaler": null}')
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "samples": ["0/a.png"], "lr": 0.5}\n')
    (tmp_path / "run.trace").write_text('[[0, "x", 5], [1, "y", 6]]\n')
    once = runs.outcome("run")
    assert once.draws == {0: ["x", 5], 1: ["y", 6]} and once.rates == [{"lr": 0.5}]
    (tmp_path / "run.trace").write_text('[[0, "z", 5], [1, "y", 6]]\n[[0, "x", 5]]\n')
    assert runs.outcome("run").draws != once.draws
