"""Threads on a CPU: no more than there are cores for, and asleep while they wait."""

import os
from pathlib import Path

import pytest
import torch

from lorakit.core.threads import cap_threads, let_waiting_sleep, usable_cores


def test_a_containers_share_counts(tmp_path: Path) -> None:
    bound = len(os.sched_getaffinity(0))
    for text, cores in (("100000 100000", 1), ("50000 100000", 1), ("6400000 100000", bound), ("max 100000", bound)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert usable_cores(tmp_path / "cpu.max") == cores
    assert usable_cores(tmp_path / "none") == bound


def test_threads_are_capped_unless_their_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert cap_threads(2) == "CPU threads: 3, as OMP_NUM_THREADS says; they sleep while they wait for each other"
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert cap_threads(2) == "CPU threads: 2, of 2 usable cores; they sleep while they wait for each other"
        assert cap_threads(8).startswith("CPU threads: 2,"), "never more"
    finally:
        torch.set_num_threads(before)


def test_what_the_user_says_of_waiting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    let_waiting_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_waiting_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "may spin" in cap_threads(1000)
