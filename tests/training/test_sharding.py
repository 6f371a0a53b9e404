"""What does not go with a model that is shared out. That it trains as a whole: tests/reliability/test_sharded.py."""

import pytest
import torch

from lorakit.core.errors import InputError, LostProcess
from lorakit.training.sharding import jointly, problems


def test_one_process_has_nobody_to_share_with() -> None:
    assert "start several" in problems({"run.compile": False})[0]


def test_what_fails_where_all_are_needed_ends_the_run() -> None:
    with pytest.raises(LostProcess, match="ValueError: shapes"), jointly(sharded=True):
        raise ValueError("shapes")
    for error in (ValueError("shapes"), InputError("a picture"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)), jointly(sharded=isinstance(error, torch.OutOfMemoryError | InputError)):
            raise error
