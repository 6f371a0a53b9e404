"""What Accelerate is asked for, and what is refused before it would go wrong."""

from pathlib import Path

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.training.processes import Runtime, resolve_precision


def test_auto_is_fp32_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision("auto") == ("fp32", "there is no GPU")
    assert resolve_precision("bf16")[0] == "bf16"
    with pytest.raises(InputError, match="fp16"):
        resolve_precision("fp16")


def test_auto_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has: has)
        assert resolve_precision("auto")[0] == expected


def test_a_launcher_that_counts_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Runtime("fp32", trackers=[], folder=tmp_path)  # this process knows that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--multi_gpu"):
        Runtime("fp32", trackers=[], folder=tmp_path)


def test_autocast_is_the_precision_asked_for(tmp_path: Path) -> None:
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = Runtime(precision, trackers=[], folder=tmp_path)  # type: ignore[arg-type]
        with runtime.autocast():
            assert linear(x.to(runtime.device)).dtype == expected
        assert runtime.scaler is None
