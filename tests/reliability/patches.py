"""What a child of the harness changes in `lorakit` before it begins: a trace of what it does, faults, planted bugs.

Each function is named in a run's `patches`; its arguments come as JSON.
"""

import functools
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def wrap(where: str, around: Callable[..., Any]) -> None:
    """Puts around(original, *args, **kwargs) in the place of "module:name" or "module:Class.name", wherever imported."""
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)
    if not owners:
        for other in [m for n, m in sys.modules.items() if n.startswith("lorakit")]:
            for alias in [a for a, value in vars(other).items() if value is original]:
                setattr(other, alias, wrapped)


# -- what happened ------------------------------------------------------------------------------------------------


def digest(tensor: Any) -> str | None:
    """A hash of a tensor's bytes."""
    return None if tensor is None else hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def trace(file: Path) -> None:
    """Writes a line for each moment of a run: see the docstring of harness.py; "micro" has the numbers it computes on."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(event: str, **facts: Any) -> None:
        os.write(handle, json.dumps({"event": event, **facts}).encode() + b"\n")

    def micro(original: Any, trainee: Any, batch: Any, **kwargs: Any) -> Any:
        say(
            "micro",
            numbers=list(batch.numbers),
            keys=list(batch.keys),
            captions=list(batch.captions),
            noise=digest(batch.noise),
            quantile=digest(batch.quantile),
            latents=digest(batch.latents),
        )
        return original(trainee, batch, **kwargs)

    def metrics(original: Any, keeper: Any, record: dict[str, Any]) -> Any:
        say("step", step=record["step"])
        return original(keeper, record)

    def begun(event: str) -> Callable[..., Any]:
        def around(original: Any, *args: Any, **kwargs: Any) -> Any:
            step = args[1] if len(args) > 1 and isinstance(args[1], int) else None
            say(event, **({"step": step} if step is not None else {}))
            return original(*args, **kwargs)

        return around

    wrap("lorakit.training.step:forward_backward", micro)
    wrap("lorakit.training.keeper:Keeper.metrics", metrics)
    for event in ("save", "sample", "validate", "finish"):
        wrap(f"lorakit.training.keeper:Keeper.{event}", begun(event))
    wrap("lorakit.training.caching:fill_cache", begun("cache"))
    wrap("lorakit.training.loop:run_loop", begun("loop"))


# -- faults -------------------------------------------------------------------------------------------------------


def slow(where: str, seconds: float) -> None:
    """The function at `where` sleeps before it begins."""

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:  # a signal's handler may cut a sleep short
            time.sleep(left)
        return original(*args, **kwargs)

    wrap(where, around)


def fails(where: str, error: str = "RuntimeError", after: int = 0) -> None:
    """The function at `where` raises, after it was called `after` times."""
    calls = [0]

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise {"RuntimeError": RuntimeError, "OSError": OSError}[error]("planted")
        return original(*args, **kwargs)

    wrap(where, around)


def dies(where: str, after: int = 0, number: int = signal.SIGKILL) -> None:
    """The process gets a signal as the function at `where` is called for the time `after` + 1."""
    calls = [0]

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    wrap(where, around)
