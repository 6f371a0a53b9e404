"""Which of torch's kernels runs a training's own attention fastest: its calls are recorded once, and timed in each.

Not here: how a step is then kept to the kernel that was chosen (`execution.py`).
"""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lorakit.core.processes import on_first_rank
from lorakit.core.types import Batch
from lorakit.training.execution import Kernel, attention
from lorakit.training.sharding import jointly
from lorakit.training.step import Trainee, predictor, ready

log = logging.getLogger("lorakit")

ROUNDS = 3  # the fastest counts: what else a machine does only slows
MARGIN = 1.05  # torch's own choice stays where none is faster by so much
SCORES = 1 << 30  # numbers; "math" writes them all down, and is not tried where one call has more
# torch's names of what follows the three tensors
OPTIONS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@dataclass(frozen=True)
class Operand:
    """What a kernel sees of a tensor but its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        dense = torch.empty_like(tensor, device="meta")  # what is stretched out over a dimension is there in full
        return cls(tuple(tensor.shape), dense.stride(), tensor.dtype)

    def made(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Call:
    """Of attention: query, key and value, and the options that are not torch's defaults."""

    operands: tuple[Operand, Operand, Operand]
    mask: Operand | None
    options: tuple[tuple[str, Any], ...]

    @property
    def scores(self) -> int:
        query, key, _ = self.operands
        return torch.Size(query.shape[:-1]).numel() * key.shape[-2]


class _Recorder(TorchFunctionMode):
    """Counts the calls of attention within it, and answers them with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        names = ("query", "key", "value", *OPTIONS)
        given = {**OPTIONS, **dict(zip(names, args)), **(kwargs or {})}
        query, key, value = (given.pop(name) for name in names[:3])
        mask = given.pop("attn_mask")
        options = tuple((name, option) for name, option in given.items() if option != OPTIONS[name])
        operands = (Operand.of(query), Operand.of(key), Operand.of(value))
        self.calls[Call(operands, None if mask is None else Operand.of(mask), options)] += 1
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def recorded(trainee: Trainee, batch: Batch) -> Counter[Call]:
    """The calls of a forward pass of this micro step, and how often each comes; the random generators stay."""
    devices = [trainee.device] if trainee.device.type == "cuda" else []
    recorder = _Recorder()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), jointly(sharded=trainee.sharded):
        batch = ready(trainee, batch)
        with torch.compiler.set_stance("force_eager"), recorder, trainee.autocast():
            trainee.objective(predictor(trainee, batch), batch)
    return recorder.calls


def timed(
    calls: Mapping[Call, int], device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[Kernel, float]:
    """Seconds that these calls take, forward and backward, in torch's own choice ("auto") and in each kernel that can
    run them all."""
    able = list(get_args(Kernel))
    if max(call.scores for call in calls) > SCORES:
        able.remove("math")
    found: dict[Kernel, float] = dict.fromkeys(able, 0.0)
    for call, count in calls.items():
        best = _seconds(call, able, device, autocast)
        able = list(best)
        for kernel in able:
            found[kernel] += count * best[kernel]
    return {kernel: found[kernel] for kernel in able}


def _seconds(
    call: Call, kernels: Sequence[Kernel], device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[Kernel, float]:
    """Of this one call, in those of the `kernels` that can run it; they take turns."""
    query, key, value = (operand.made(device).normal_().requires_grad_() for operand in call.operands)
    mask = None if call.mask is None else torch.ones(call.mask.shape, dtype=call.mask.dtype, device=device)
    best = {kernel: float("inf") for kernel in kernels}
    for turn in range(1 + ROUNDS):  # the first sets things up
        for kernel in list(best):
            _wait(device)
            started = time.perf_counter()
            try:
                with warnings.catch_warnings(), attention(kernel):
                    warnings.simplefilter("ignore")  # why a kernel cannot
                    with autocast():
                        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **dict(call.options))
                    torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
            except RuntimeError:  # there is none for these shapes, this mask, this device; or not the memory
                if kernel == "auto":
                    raise
                del best[kernel]
                continue
            _wait(device)
            if turn:
                best[kernel] = min(best[kernel], time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(trainee: Trainee, batch: Batch) -> Kernel:
    """The kernel in which the attention of this micro step takes the least time, "auto" for torch's own choice; what
    rank 0 measures, on all ranks, and logged with the times."""
    calls = recorded(trainee, batch)
    return on_first_rank(lambda: _chosen(timed(calls, trainee.device, trainee.autocast)) if calls else "auto")


def _chosen(seconds: Mapping[Kernel, float]) -> Kernel:
    best = min(seconds, key=lambda kernel: seconds[kernel])
    chosen: Kernel = best if MARGIN * seconds[best] < seconds["auto"] else "auto"
    times = ", ".join(f"{kernel} {1000 * spent:.3g} ms" for kernel, spent in seconds.items())
    log.info("run.attention, forward and backward of the largest micro step: %s: %s", times, chosen)
    return chosen
