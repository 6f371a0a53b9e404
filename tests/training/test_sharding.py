"""What a launch may not ask for. That a shared-out model trains as a whole one: tests/reliability/test_sharded.py."""

from pathlib import Path

import pytest
import torch

from lorakit.core.errors import InputError, LostProcess
from lorakit.training.processes import Runtime
from lorakit.training.sharding import jointly, problems


@pytest.mark.parametrize(("engine", "what"), [("FSDP", "run.shard"), ("DEEPSPEED", "untried"), ("MEGATRON_LM", "Mega")])
def test_an_engine_that_would_be_passed_over_is_refused(
    engine: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=what):
        Runtime("fp32", folder=tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    Runtime("fp32", folder=tmp_path)


def test_one_process_has_nobody_to_share_with() -> None:
    assert "start several" in problems({"run.compile": False})[0]


def test_what_fails_where_all_are_needed_ends_the_run() -> None:
    with pytest.raises(LostProcess, match="ValueError: shapes"), jointly(sharded=True):
        raise ValueError("shapes")
    for error in (ValueError("shapes"), InputError("a picture"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)), jointly(sharded=isinstance(error, torch.OutOfMemoryError | InputError)):
            raise error
