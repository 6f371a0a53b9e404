"""What a child of the harness changes in `lorakit` before it begins: a trace of what it does, faults, planted bugs.

Each function is named in a run's `patches`; its arguments come as JSON.
"""

import dataclasses
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
    """Puts around(original, *args, **kwargs) in the place of "module:name" or "module:Class.name", in all modules."""
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


_trace: list[int] = []  # the open file


def say(event: str, **facts: Any) -> None:
    os.write(_trace[0], json.dumps({"event": event, **facts}).encode() + b"\n")


def trace(file: Path) -> None:
    """Writes a line for each moment of a run, see the docstring of harness.py.

    "micro" tells what is computed on, "finish" the hash of the trained weights. Micro steps before the loop (a dry
    step) are not told.
    """
    _trace.append(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    looping = []

    def micro(original: Any, trainee: Any, batch: Any, **kwargs: Any) -> Any:
        if looping:
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

    def loop(original: Any, *args: Any, **kwargs: Any) -> Any:
        say("loop")
        looping.append(True)
        return original(*args, **kwargs)

    def metrics(original: Any, keeper: Any, record: dict[str, Any]) -> Any:
        say("step", step=record["step"])
        return original(keeper, record)

    def begun(event: str) -> Callable[..., Any]:
        def around(original: Any, *args: Any, **kwargs: Any) -> Any:
            say(event, **({"step": args[1]} if args[1:] and isinstance(args[1], int) else {}))
            return original(*args, **kwargs)

        return around

    def finish(original: Any, keeper: Any, step: int) -> Any:
        say("finish", weights={name: digest(p) for name, p in keeper.trainee.parameters.items()})
        return original(keeper, step)

    wrap("lorakit.training.step:forward_backward", micro)
    wrap("lorakit.training.loop:run_loop", loop)
    wrap("lorakit.training.caching:fill_cache", begun("cache"))
    wrap("lorakit.training.keeper:Keeper.metrics", metrics)
    wrap("lorakit.training.keeper:Keeper.finish", finish)
    for event in ("save", "sample", "validate"):
        wrap(f"lorakit.training.keeper:Keeper.{event}", begun(event))


# -- faults -------------------------------------------------------------------------------------------------------


def slow(where: str, seconds: float) -> None:
    """The function at `where` sleeps before it begins."""

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:  # a signal's handler may cut a sleep short
            time.sleep(left)
        return original(*args, **kwargs)

    wrap(where, around)


def fails(where: str, error: str = "RuntimeError", after: int = 0, times: int = 1_000_000) -> None:
    """The function at `where` raises, so many `times` after it was called `after` times."""
    calls = [0]

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if after < calls[0] <= after + times:
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


def not_finite(what: str, steps: list[int], only_rank: int | None = None) -> None:
    """Plants what is not finite in these optimizer steps: in the "latents" or the "loss" of the step's first example,
    in one number of a "gradient", or of a "moment" that the optimizer writes.

    The trace's "update" tells of each step whether the weights are the same after it."""
    import torch

    from lorakit.core.processes import rank

    done, planted = [0], [False]

    def bad(tensor: Any) -> Any:
        tensor = tensor.clone()
        tensor.view(-1)[0] = float("nan")
        return tensor

    def run_step(original: Any, trainee: Any, *args: Any, **kwargs: Any) -> Any:
        done[0] += 1
        planted[0] = done[0] in steps and only_rank in (None, rank())
        before = [digest(parameter) for parameter in trainee.parameters.values()]
        report = original(trainee, *args, **kwargs)
        after = [digest(parameter) for parameter in trainee.parameters.values()]
        say("update", step=done[0], same=before == after)
        return report

    def forward(original: Any, trainee: Any, batch: Any, **kwargs: Any) -> Any:
        if not planted[0]:
            return original(trainee, batch, **kwargs)
        planted[0] = what == "moment"  # once in a step
        if what == "latents":
            batch = dataclasses.replace(batch, latents=bad(batch.latents))
        if what == "loss":

            def objective(*given: Any) -> Any:
                report = trainee.objective(*given)
                # a constant: gradients know nothing of it
                return dataclasses.replace(report, per_example=report.per_example + bad(0 * batch.weight))

            return original(dataclasses.replace(trainee, objective=objective), batch, **kwargs)
        made = original(trainee, batch, **kwargs)
        if what == "gradient":
            first = next(iter(trainee.parameters.values()))
            first.grad = bad(first.grad)
        return made

    def step(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(optimizer, *args, **kwargs)
        if planted[0]:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
        return made

    wrap("lorakit.training.step:run_step", run_step)
    wrap("lorakit.training.step:forward_backward", forward)
    if what == "moment":
        original = torch.optim.AdamW.step
        torch.optim.AdamW.step = lambda self, *args: step(original, self, *args)  # type: ignore[method-assign]


# -- planted bugs: each loses something of a resume, and must be seen in the comparison ------------------------------


def noise_from_the_global_generator() -> None:
    import torch

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        return dataclasses.replace(batch, noise=torch.randn(batch.noise.shape))

    wrap("lorakit.data.loader:_Samples.batch", around)


def sampler_one_step_ahead() -> None:
    def around(original: Any, loader: Any, first_step: int, last_step: int) -> Any:
        return original(loader, first_step + 1, last_step + 1) if first_step else original(loader, 0, last_step)

    wrap("lorakit.data.loader:Loader.steps", around)


def schedule_from_its_start() -> None:
    def around(original: Any, *args: Any, lr_factor: Any, first_step: int, **kwargs: Any) -> Any:
        later = lambda step: lr_factor(step - first_step)  # noqa: E731
        return original(*args, lr_factor=later, first_step=first_step, **kwargs)

    wrap("lorakit.training.loop:run_loop", around)


def state_not_restored(entry: str, only_first: bool) -> None:
    """`entry` of the optimizer's state is zero after it was restored: of all parameters, or of the first alone."""

    def around(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        original(optimizer, *args, **kwargs)
        for state in list(optimizer.state.values())[: 1 if only_first else None]:
            state[entry].zero_()

    wrap("lorakit.optimizers.state:restore_optimizer", around)


def cpu_scaler() -> None:
    """Gives the CPU a loss scaler, whose scale grows in uneven steps: one of two would not change a bit."""
    import torch

    def around(original: Any, runtime: Any, *args: Any, **kwargs: Any) -> Any:
        original(runtime, *args, **kwargs)
        runtime.scaler = torch.amp.GradScaler("cpu", init_scale=100.0, growth_factor=1.7, growth_interval=2)

    wrap("lorakit.training.processes:Runtime.__init__", around)


def scaler_not_restored() -> None:
    import torch

    torch.amp.GradScaler.load_state_dict = lambda self, state: None  # type: ignore[method-assign]


def average_not_restored() -> None:
    wrap("lorakit.adapters.ema:Average.load", lambda original, average, tensors: None)


def threads(count: int) -> None:
    """The process begins with another number of threads than the run had."""
    import torch

    torch.set_num_threads(count)
