"""Memory that was freed is the system's again."""

import sys

import psutil
import pytest
import torch

from lorakit.core.memory import give_back, peak


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's affair")
def test_what_is_freed_is_given_back() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    give_back()
    before = resident()
    pieces = [torch.ones(1 << 14) for _ in range(1000)]  # 64 MB, in pieces that glibc keeps
    full = resident()
    last = pieces[-1]
    pieces.clear()
    give_back()
    assert full - before > 50 << 20
    assert resident() - before < 10 << 20
    assert last[0] == 1 and (peak() or 0) > full - (4 << 20), "the system counts in steps"
