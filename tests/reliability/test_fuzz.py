"""Damaged adapter files by the thousand: what the quick test of lorakit/export/container.py tries, and more."""

import pytest

from tests.export.fuzz import hammer


@pytest.mark.soak
def test_damaged_adapter_files_are_refused_or_are_what_was_written(tmp_path, record_property) -> None:
    record_property("trials", 10_000)
    counts = hammer(tmp_path, range(10_000, 20_000))
    assert sum(counts.values()) == 10_000
