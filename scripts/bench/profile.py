"""Where a step's time goes: the frozen model, its adapters, the backward pass, the update, the wait for data, the rest.

    OMP_NUM_THREADS=1 python scripts/bench/profile.py --shape sd-small --steps 20

Parts are measured inside a real `lorakit train`, those of micro steps added up, in CPU seconds of all processes; on a
GPU in the clock's seconds, with a synchronisation around each part, which a training has not. The frozen model's
forward is measured once more by itself: what the training's forward takes beyond it are the adapters, the loss and the
recording for the way back. Casts, and what autograd keeps for the way back, are counted in a further step.

Operations are those that a step needs, whatever it does: of the products with frozen weights and the convolutions one
forward and one on the way back, for the gradient of what went in (a frozen weight has none); of attention's two
products four on the way back. Not counted are adapters, the update, everything elementwise, and what is computed again
or unpacked to save memory. They are set against a large matrix product measured in the same process.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

from bench.meter import clock
from bench.train import WARM, Enough, written

SIDE = 2048  # of the matrices of the ceiling
CASTS = {"aten::_to_copy": "of a tensor", "aten::_foreach_copy_": "of many at once"}


def timed(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """`call`, which notes its seconds."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return call(*args, **kwargs)
        finally:
            into.append(clock() - started)

    return measured


def ceiling(dtype: Any, device: Any) -> float:
    """Operations a second of the fastest of some large matrix products."""
    import torch

    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    for _ in range(4):
        timed(torch.mm, seconds)(a, b)
    return 2 * SIDE**3 / min(seconds)


def base_forward(trainee: Any, batches: Sequence[Any], *, count: int) -> tuple[list[float], float]:
    """Seconds of the frozen model's forward passes without adapters, and the operations, of a step with these batches,
    `count` times."""
    import torch

    from lorakit.adapters.state import adapters_disabled
    from lorakit.training.step import predictor, ready

    batches, seconds = [ready(trainee, batch) for batch in batches], []

    def forward() -> None:
        with torch.no_grad(), adapters_disabled(trainee.adapted), trainee.autocast():
            for batch in batches:
                trainee.objective(predictor(trainee, batch), batch)

    for _ in range(count):
        timed(forward, seconds)()
    return seconds, operations(forward)


def operations(forward: Callable[[], None]) -> float:
    """Those of a forward pass through frozen weights and the way back. Attention is left out meanwhile and counted from
    its shapes, and products in 8 bits count as whole ones: not every kernel's name is known to torch's counter."""
    from unittest.mock import patch

    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    from lorakit.families.eightbit import EightBitLinear
    from lorakit.families.quantized import QuantizedLinear

    attended = 0.0

    class Unattended(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal attended
            if function is not F.scaled_dot_product_attention:
                return function(*args, **(kwargs or {}))
            given = dict(zip(("query", "key", "value"), args), **(kwargs or {}))
            query, key, value = given["query"], given["key"], given["value"]
            attended += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
            return query.new_zeros(*query.shape[:-1], value.shape[-1])

    counter = FlopCounterMode(display=False)
    whole = patch.object(EightBitLinear, "forward", QuantizedLinear.forward)
    with torch.compiler.set_stance("force_eager"), whole, Unattended(), counter:
        forward()
    return 2.0 * counter.get_total_flops() + 3 * attended


def parts(recipe: Any, *, steps: int) -> dict[str, Any]:
    """Median seconds of each part of a step, and of the whole; the operations that a step needs, and the ceiling."""
    from torch.profiler import profile

    import lorakit.training.step as step
    import lorakit.verbs.train as verb
    from lorakit.training.savings import counted

    taken: dict[str, list[float]] = defaultdict(list)
    found: dict[str, Any] = {}
    run_loop, guarded_step, forward_backward = verb.run_loop, step.guarded_step, step.forward_backward

    def measured(trainee: Any, plans: Iterator[Any], **rest: Any) -> Any:
        def watched() -> Iterator[Any]:
            following = timed(lambda: next(plans), taken["data"])
            for number in range(steps + WARM):
                started = clock()
                yield following()
                taken["step"].append(clock() - started)
                for of_micro_steps in (taken["forward"], taken["both"]):
                    of_micro_steps[number:] = [sum(of_micro_steps[number:])]
            with profile() as profiled, counted(trainee) as kept:
                yield (plan := next(plans))
            casts = {event.key: event.count for event in profiled.key_averages() if event.key in CASTS}
            base, needed = base_forward(trainee, plan.batches, count=max(3, steps // 4))
            found.update(base=statistics.median(base), operations=needed, casts=casts, kept=kept.bytes)
            found["ceiling"] = ceiling(trainee.family.dtype, trainee.device)
            raise Enough

        return run_loop(replace(trainee, objective=timed(trainee.objective, taken["forward"])), watched(), **rest)

    verb.run_loop = measured
    step.guarded_step = timed(guarded_step, taken["update"])
    step.forward_backward = timed(forward_backward, taken["both"])
    try:
        verb.train(recipe)
    except Enough:
        pass
    finally:
        verb.run_loop, step.guarded_step, step.forward_backward = run_loop, guarded_step, forward_backward
    whole, data, forward, both, update = (
        statistics.median(taken[name][WARM : WARM + steps]) for name in ("step", "data", "forward", "both", "update")
    )
    return {
        "the frozen forward": found["base"],
        "adapters, loss and recording in the forward": forward - found["base"],
        "backward": both - forward,
        "update": update,
        "waiting for data": data,
        "all else on the host": whole - both - update - data,
        "step": whole,
        "operations": found["operations"],
        "ceiling": found["ceiling"],
        "casts": found["casts"],
        "kept": found["kept"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from bench import shapes

    from lorakit.recipe import load_recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="sd-small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--set", nargs="*", default=[], metavar="WORD", help="settings of the recipe")
    parser.add_argument("--bases", type=Path, help="keep the bases that are made here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as folder:
        said = ["run.check_model=false", f"run.steps={args.steps + WARM + 2}", *args.set]
        found = parts(load_recipe(written(args, Path(folder), "profile"), overrides=said), steps=args.steps)
    operations, most, whole = found["operations"], found["ceiling"], found["step"]
    for name, seconds in list(found.items())[:-4]:
        print(f"| {name} | {1000 * seconds:.1f} ms | {100 * seconds / whole:.1f} % |")
    print(
        f"{operations / 1e9:.1f} G operations a step, {operations / whole / 1e9:.1f} G a second: "
        f"{100 * operations / whole / most:.0f} % of the {most / 1e9:.1f} G of a matrix product of {SIDE}³"
    )
    print("casts in a step: " + ", ".join(f"{found['casts'].get(key, 0)} {words}" for key, words in CASTS.items()))
    print(f"kept for the backward pass: {found['kept'] / 2**20:.1f} MiB")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
