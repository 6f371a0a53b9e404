"""The measurements measure: the floor trains the same layers on the same model, and ratios are those of pairs."""

import json
import sys
from pathlib import Path

import pytest
from bench import memory, meter, profile, train

TINY = ["--shape", "embedded", "--photos", "2"]


def test_a_ratio_is_of_pairs_and_says_how_sure_it_is() -> None:
    machine = [1.0, 5.0, 1.0, 3.0, 2.0, 1.0, 4.0, 1.0]  # what else runs slows both
    found = meter.ratio([1.1 * seconds for seconds in machine], machine)
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1)) and found.pairs == 8
    spread = meter.ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [1.0] * 9)
    assert (spread.low, spread.median, spread.high) == (2.0, 5.0, 8.0)
    few = meter.ratio([1.0, 2.0, 3.0], [1.0] * 3)
    assert (few.low, few.high) == (1.0, 3.0), "of few pairs all"


def test_children_count() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    assert 0.25 < train.spent_by([sys.executable, "-c", burn]) < 2
    before = meter.cpu_seconds()
    train.spent_by([sys.executable, "-c", burn])
    assert meter.cpu_seconds() - before > 0.25


def test_steps_alternate_with_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.json"
    words = ["steps", *TINY, "--pairs", "2", "--json", str(file)]
    train.main([*words, "--set", "adapter.fused=false"])
    [row] = json.loads(file.read_text())["steps"]
    assert row["settings"] == "adapter.fused=false"
    assert row["ratio"]["pairs"] == 2 and 0 < row["ratio"]["low"] <= row["ratio"]["high"]
    assert "| embedded | adapter.fused=false |" in capsys.readouterr().out


def test_another_programs_step_is_what_more_of_them_cost(tmp_path: Path) -> None:
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.1 * {{steps}}: pass'"
    file = tmp_path / "beside.json"
    train.main(["beside", *TINY, "--rounds", "1", "--pairs", "4", "--command", burn, "--json", str(file)])
    [row] = json.loads(file.read_text())["beside"]
    assert row["a_step"] == pytest.approx(0.1, rel=0.5)


def test_the_parts_of_a_step_make_it_up(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.main([*TINY, "--steps", "3", "--set", "run.precision=bf16", "run.accumulate=2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found.pop("casts")["aten::_foreach_copy_"] == 1, "all adapters together"
    operations, ceiling, step = (found.pop(name) for name in ("operations", "ceiling", "step"))
    assert sum(found.values()) == pytest.approx(step)
    assert found["the frozen forward"] > 0 and found["backward"] > 0 and operations / step < ceiling


def test_memory_is_measured_of_steps_and_of_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROWS", [("run.batch_size=1", "run.accumulate=2")])
    file = tmp_path / "memory.json"
    memory.main(["settings", "parts", *TINY[:2], "--batch", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    [row] = found["settings"].values()
    assert 100 * memory.MIB < row["before"] <= row["peak"] + memory.MIB and row["seconds"] > 0
    assert found["parts"].keys() == {"all parts kept and read", "as it is"}
    assert all({*of} == {"read", "step", "verified"} for of in found["parts"].values())
    assert "| `run.batch_size=1`, `run.accumulate=2` |" in capsys.readouterr().out
