"""What a launcher asks for besides processes: DeepSpeed's ZeRO is kept without it, all else refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import InputError
from lorakit.training.engines import without_engines, zero_stage
from lorakit.training.processes import Runtime


@pytest.mark.parametrize(("engine", "what"), [("FSDP", "run.shard"), ("MEGATRON_LM", "Mega")])
def test_an_engine_that_would_be_passed_over_is_refused(
    engine: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=what):
        Runtime("fp32", folder=tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "false")
    Runtime("fp32", folder=tmp_path)


def ask(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in values.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)


def test_deepspeed_is_not_started_and_said_to_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert zero_stage() == 0
    ask(monkeypatch)
    assert zero_stage() == 2, "what Accelerate takes where nothing is said"
    ask(monkeypatch, ZERO_STAGE="3", OFFLOAD_PARAM_DEVICE="none")
    with without_engines() as stage:
        assert stage == 3 and "ACCELERATE_USE_DEEPSPEED" not in os.environ
    caplog.set_level("INFO", logger="lorakit")
    for _ in range(2):  # and is asked for again by the next training
        Runtime("fp32", folder=tmp_path)
    assert caplog.text.count("ZeRO-3") == 2 and zero_stage() == 3


def test_what_would_be_left_undone_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, ZERO_STAGE="4")
    with pytest.raises(InputError, match="stage 4"):
        zero_stage()
    ask(monkeypatch, ZERO_STAGE="3", OFFLOAD_PARAM_DEVICE="cpu", OFFLOAD_OPTIMIZER_DEVICE="nvme")
    with pytest.raises(InputError, match="offload_param = cpu and offload_optimizer = nvme.*run.offload"):
        zero_stage()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}, "bf16": {"enabled": True}}, 3),
        ({"zero_optimization": {"stage": 1}}, 1),
        ({}, 0),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param = nvme"),
        ({"zero_optimization": 3}, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_its_own_file_counts(content: Any, found: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(content))
    ask(monkeypatch, CONFIG_FILE=str(file), ZERO_STAGE="2")
    if isinstance(found, int):
        assert zero_stage() == found
        return
    with pytest.raises(InputError, match=found):
        zero_stage()
