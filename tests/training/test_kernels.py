"""The fastest kernel is found on the model's own calls."""

import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lorakit.core.types import Batch, LossReport, Predict
from lorakit.training import kernels
from lorakit.training.kernels import Call, Operand, recorded, timed
from tests.training.test_step import batch, trainee

CPU = torch.device("cpu")


def call(*, keys: int = 7, dtype: torch.dtype = torch.float32, mask: bool = False) -> Call:
    def laid(length: int) -> Operand:  # as diffusers hands it over: heads behind tokens
        return Operand.of(torch.empty(2, length, 3, 8, dtype=dtype).transpose(1, 2))

    shown = Operand.of(torch.ones(2, 1, 5, keys, dtype=torch.bool)) if mask else None
    return Call((laid(5), laid(keys), laid(keys)), shown, (("scale", 0.5),))


def attending(predict: Predict, batch: Batch) -> LossReport:
    """Calls attention three times, and draws random numbers."""
    first, masked = call(), call(mask=True)
    for one in (first, masked, first):
        query, key, value = (operand.made(CPU) for operand in one.operands)
        shown = None if one.mask is None else torch.ones(one.mask.shape, dtype=one.mask.dtype)
        out = F.scaled_dot_product_attention(query, key, value=value, attn_mask=shown, scale=0.5)
        assert out.shape == query.shape and not out.any(), "not computed"
    torch.rand(1)
    return LossReport(torch.zeros(len(batch.keys)), torch.zeros(len(batch.keys)))


def test_calls_are_recorded_with_all_that_a_kernel_sees() -> None:
    model = replace(trainee(), objective=attending)
    before = torch.get_rng_state()
    calls = recorded(model, batch([1, 2]))
    assert calls == Counter({call(): 2, call(mask=True): 1})
    assert call().operands[0].stride == (5 * 3 * 8, 8, 3 * 8, 1) and call().scores == 2 * 3 * 5 * 7
    assert torch.equal(torch.get_rng_state(), before)
    stretched = Operand.of(torch.zeros(1, 1, 4).expand(2, 3, 4))
    assert stretched.made(CPU).shape == (2, 3, 4) and stretched.made(CPU).normal_().unique().numel() > 4


def test_kernels_that_can_run_all_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {call(): 2, call(dtype=torch.bfloat16): 1, call(mask=True): 1}
    found = timed(calls, CPU, nullcontext)
    assert found.keys() == {"auto", "flash", "math"} and min(found.values()) > 0
    monkeypatch.setattr(kernels, "_seconds", lambda call, able, *rest: dict.fromkeys(able, call.operands[1].shape[-2]))
    assert timed({call(): 2, call(keys=11): 3}, CPU, nullcontext)["flash"] == 2 * 7 + 3 * 11
    monkeypatch.setattr(kernels, "SCORES", call().scores)
    assert "math" in timed({call(): 1}, CPU, nullcontext)
    assert "math" not in timed({call(): 1, call(keys=8): 1}, CPU, nullcontext), "it would fill the memory"


@pytest.mark.gpu
def test_a_gpus_kernels_are_timed() -> None:
    found = timed({call(dtype=torch.bfloat16): 1}, torch.device("cuda"), nullcontext)
    assert {"auto", "flash", "efficient", "math"} <= found.keys() and min(found.values()) > 0
    assert "flash" not in timed({call(dtype=torch.bfloat16, mask=True): 1}, torch.device("cuda"), nullcontext)


def test_what_no_kernel_can_run_is_an_error() -> None:
    query, _, value = call().operands
    wide = Operand.of(torch.empty(2, 3, 7, 9))  # another width than the query's
    with pytest.raises(RuntimeError):
        timed({Call((query, wide, value), None, ()): 1}, CPU, nullcontext)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"auto": 2.0, "flash": 1.0, "math": 3.0}, "flash"),
        ({"auto": 2.0, "flash": 1.95, "math": 3.0}, "auto"),  # by a hair: torch's own
        ({"auto": 1.0, "flash": 2.0}, "auto"),
    ],
)
def test_torchs_choice_stays_unless_another_is_clearly_faster(
    seconds: dict[Any, float], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lorakit"):
        assert kernels._chosen(seconds) == chosen
    assert "flash" in caplog.text and caplog.text.rstrip().endswith(f": {chosen}")


def test_the_first_ranks_choice_is_everyones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_first_rank", lambda action: "math")
    monkeypatch.setattr(kernels, "timed", None)  # another rank measures nothing
    assert kernels.fastest(replace(trainee(), objective=attending), batch([1])) == "math"
    quiet = replace(trainee(), objective=lambda predict, batch: LossReport(torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(kernels, "on_first_rank", lambda action: action())
    assert kernels.fastest(quiet, batch([1])) == "auto", "a model without attention"
