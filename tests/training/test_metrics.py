"""metrics.jsonl: one line per step, whole lines only."""

import json
from pathlib import Path

from lorakit.training.metrics import BLOCK, MetricsFile


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_flushed_in_blocks_and_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in range(1, BLOCK + 3):
        file.write({"step": step, "loss": 0.1})
    assert steps(path) == list(range(1, BLOCK + 1))
    file.flush()
    assert steps(path) == list(range(1, BLOCK + 3))


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.write({"step": 1, "loss": 1 / 3})
    file.flush()
    assert json.loads(path.read_text())["loss"] == 1 / 3


def test_going_on_cuts_what_lies_past_the_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4))
    path.write_text(whole + '{"step": 5, "lo')
    file = MetricsFile(path, step=3)
    assert steps(path) == [1, 2, 3]
    file.write({"step": 4})
    file.flush()
    assert steps(path) == [1, 2, 3, 4]
