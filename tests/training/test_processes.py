"""What Accelerate is asked for, and what is refused before it would go wrong."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.core.processes import TIME_LIMIT
from lorakit.training.processes import Runtime, reproducible, resolve_precision


def test_auto_is_fp32_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision("auto") == ("fp32", "there is no GPU")
    assert resolve_precision("bf16")[0] == "bf16"
    with pytest.raises(InputError, match="fp16"):
        resolve_precision("fp16")


def test_auto_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "fp16")):

        def supported(including_emulation: bool = True, has: bool = has) -> bool:
            return has or including_emulation  # in which any GPU computes, slowly

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert resolve_precision("auto")[0] == expected


def test_a_launcher_that_counts_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Runtime("fp32", folder=tmp_path)  # this process knows that it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--multi_gpu"):
        Runtime("fp32", folder=tmp_path)


def test_a_launcher_that_starts_one_of_several_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Runtime("fp32", folder=tmp_path)
    assert "--multi_gpu" not in caplog.text, "nobody launched it"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch --cpu --num_processes 2` does
    Runtime("fp32", folder=tmp_path)
    assert "started one process" in caplog.text and "--multi_gpu" in caplog.text


def test_autocast_is_the_precision_asked_for(tmp_path: Path) -> None:
    linear, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = Runtime(precision, folder=tmp_path)  # type: ignore[arg-type]
        with runtime.autocast():
            assert linear(x.to(runtime.device)).dtype == expected
        assert runtime.scaler is None


def test_processes_wait_for_each_other_no_longer_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import accelerate

    given: dict[str, Any] = {}

    def refusing(**options: Any) -> None:
        given.update(options)
        raise ValueError("no such backend")

    monkeypatch.setattr(accelerate, "Accelerator", refusing)
    with pytest.raises(InputError, match="no such backend"):
        Runtime("fp32", folder=tmp_path, deterministic=True)
    assert [handler.timeout for handler in given["kwargs_handlers"]] == [TIME_LIMIT]
    assert not torch.are_deterministic_algorithms_enabled(), "a runtime that could not be made leaves nothing behind"


def settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_deterministic_holds_for_the_run_and_is_put_back(
    workspace: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For who trains from Python: the settings are the process's, and were somebody's before."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(KeyError):
            with Runtime("fp32", folder=tmp_path, deterministic=True) as runtime:
                assert settings() == (True, False, False, workspace or ":4096:8")
                runtime.end()
                assert settings() == before
                raise KeyError("a run that fails")
        with Runtime("fp32", folder=tmp_path), reproducible():
            assert settings() == (True, False, False, workspace or ":4096:8")
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)
