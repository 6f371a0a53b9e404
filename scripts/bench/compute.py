"""What multiplying in 8 bits (`model.compute`) changes of what is learned, and what it gains.

`losses`: trainings at the same draws, in bf16 with and without it, of a base of a true shape with random weights: how
far their losses are apart, of all steps together and of the worst hundred.
`subject`: the demo's subject taught to the embedded base with and without it, nothing held on to: what the judge sees
of it and of old things, as in `scripts/preservation.py`.
`products`: a layer with its adapter, forward and backward, in turns with the same in bf16 (without a GPU fp32).
`kernels`: compiles the Triton kernels for GPUs that need not be there, and says which instructions multiply.
A whole step is what `scripts/bench/train.py steps --set model.compute=…` measures.

    OMP_NUM_THREADS=1 python scripts/bench/compute.py losses --steps 500 --side 128 --json build/losses.json
    OMP_NUM_THREADS=1 python scripts/bench/compute.py subject products
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

from bench import shapes
from bench.meter import Ratio, ratio
from bench.train import clock

KINDS = ("int8", "fp8")
STRETCH = 100  # steps whose losses are compared as one
# rows, inputs and outputs of layers: SDXL's and FLUX's at 1024 pixels, and what a CPU can bear
LAYERS = {
    "cuda": ((4096, 640, 640), (1024, 1280, 10240), (4608, 3072, 3072), (4608, 3072, 12288), (4608, 15360, 3072)),
    "cpu": ((1024, 320, 320), (256, 640, 5120), (256, 1280, 1280)),
}
GENERATIONS = {"Ampere": 80, "GeForce Ampere": 86, "Ada": 89, "Hopper": 90, "Blackwell": 100, "GeForce Blackwell": 120}
WHOLE = ("m", "n", "k", "rank", "b_k", "b_n", "right_r", "right_n")  # arguments of the kernel that are whole numbers
EIGHT_BITS = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|\bmma)\.[\w.:]*(?:s8|e4m3|i8|f8f6f4)[\w.]*")


# -- losses ------------------------------------------------------------------------------------------------------------


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def apart(losses: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """How far the mean is from the others', relative, and how far that of the worst stretch of steps."""
    starts = range(0, len(losses), STRETCH)
    parts = [(losses[i : i + STRETCH], others[i : i + STRETCH]) for i in starts]
    far = [abs(statistics.mean(own) / statistics.mean(other) - 1) for own, other in parts]
    return abs(statistics.mean(losses) / statistics.mean(others) - 1), max(far)


def measure_losses(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from lorakit.recipe import load_recipe
    from lorakit.verbs.train import train

    settings = {"bf16": [], **{kind: [f"model.compute={kind}"] for kind in KINDS}, "fp32": ["run.precision=fp32"]}
    found: dict[str, Any] = {}
    print(f"| {args.shape}, {args.steps} steps | mean loss | apart | the worst {STRETCH} steps | at most, one step |")
    print("| --- | --- | --- | --- | --- |")
    for name, words in settings.items():
        file = folder / f"{name}.toml"
        recipe = shapes.recipe(args.shape, file, bases=folder, cache=folder / "cache", count=16, batch=args.batch)
        said = [f"data.buckets.resolution={args.side}", f"run.steps={args.steps}", "optimizer.lr=1e-3"]
        said += ["run.precision=bf16", "run.check_model=false", *words]
        train(load_recipe(recipe, overrides=said))
        losses = found[name] = losses_of(file.with_suffix(""))
        whole, worst = apart(losses, found["bf16"])
        one = max(abs(own / other - 1) for own, other in zip(losses, found["bf16"], strict=True))
        label = name if name in ("bf16", "fp32") else f"bf16, `model.compute={name}`"
        print(f"| {label} | {statistics.mean(losses):.5f} | {whole:.3%} | {worst:.3%} | {one:.3%} |", flush=True)
    return found


# -- the demo's subject ------------------------------------------------------------------------------------------------


def measure_subject(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import preservation

    from lorakit.core.files import make_folder

    found: dict[str, Any] = {}
    print("| subject, 300 steps | subject | backgrounds | old prompts | traces | drift | mean loss | apart |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in (None, *KINDS):
        label = f"`model.compute={kind}`" if kind else "as it is"
        asked = preservation.recipe("nothing", make_folder(folder / str(kind)), steps=300)
        asked = replace(asked, model=asked.model.model_copy(update={"compute": kind}))
        adapter, _ = preservation.trained(asked)
        losses = losses_of(adapter.parent)
        far, _ = apart(losses, found["None"]["losses"] if kind else losses)
        scores = preservation.scored(adapter, folder)
        found[str(kind)] = {**scores, "losses": losses}
        shares = " | ".join(f"{scores[key]:.0%}" for key in ("subject", "backgrounds", "old", "traces"))
        drift, mean = 1000 * scores["drift"], statistics.mean(losses)
        print(f"| {label} | {shares} | {drift:.1f} | {mean:.5f} | {far:.3%} |", flush=True)
    return found


# -- products ----------------------------------------------------------------------------------------------------------


def adapted(layer: Any) -> Any:
    from torch import nn

    from lorakit.adapters.fused import fuse
    from lorakit.adapters.state import LayerPlan, inject_layers

    model = nn.Sequential(layer)
    inject_layers(model, {"0": LayerPlan(rank=16, alpha=16.0)})
    fuse(model)
    return model.to(layer.bias.device).train()


def measure_products(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from lorakit.families.eightbit import EightBitLinear, problems

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    print(f"| rows × inputs × outputs, {device} | compute | full | 8 bits | full through 8 bits |")
    print("| --- | --- | --- | --- | --- |")
    for count, inputs, outputs in LAYERS[device]:
        x = torch.randn(count, inputs, device=device, dtype=dtype, requires_grad=True)
        g = torch.randn(count, outputs, device=device, dtype=dtype)

        def seconds(model: Any, x: Any = x, g: Any = g) -> float:
            started = clock()
            with torch.autocast(device, dtype, enabled=device == "cuda"):
                y = model(x)
            y.backward(g)
            return clock() - started

        for kind in KINDS:
            if problems(kind):
                continue
            layer = nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
            full, eight = adapted(layer), adapted(EightBitLinear(layer, kind))
            pairs = [(seconds(full), seconds(eight)) for _ in range(args.pairs + 3)][3:]
            faster = ratio([a for a, _ in pairs], [b for _, b in pairs])
            a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append({"layer": [count, inputs, outputs], "kind": kind, "full": a, "eight": b, "faster": str(faster)})
            size = f"{count} × {inputs} × {outputs}"
            print(f"| {size} | {kind} | {a * 1e3:.2f} ms | {b * 1e3:.2f} ms | {_short(faster)} |", flush=True)
    return rows


def _short(found: Ratio) -> str:
    return f"{found.median:.2f} × ({found.low:.2f} … {found.high:.2f})"


# -- kernels -----------------------------------------------------------------------------------------------------------


def compiled(kernel: Any, types: dict[str, str], given: dict[str, Any], generation: int, **options: int) -> Any:
    """`kernel` for GPUs of a `generation`, for arguments of these types and those that are `given`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in given else types[name] for name in names}
    whole = [i for i, name in enumerate(names) if name not in given and types[name] != "fp32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)


def measure_kernels(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import triton

    from lorakit.families import kernels

    rows = []
    of_ways: dict[str, dict[str, Any]] = {
        "forward": {"b_k": 1, "right_r": 1},
        "back": {"b_n": 1, "right_n": 1, "b_scales": None, "bias": None},
    }
    print(
        f"| triton {triton.__version__} | compute | multiplies by | shared memory, at most |\n| --- | --- | --- | --- |"
    )
    for name, generation in GENERATIONS.items():
        for kind in KINDS if generation >= 89 else KINDS[:1]:
            eight, sums = {"int8": ("*i8", kernels.tl.int32), "fp8": ("*fp8e4nv", kernels.tl.float32)}[kind]
            types = {"x": "*bf16", "within": "*fp32", "q": eight, "scales": "*fp32", "columns": "i32"}
            given = {"LARGEST": 127.0, "WHOLE": kind == "int8", "BLOCK": 4096}
            compiled(kernels._quantize, types, given, generation)
            used, shared = set(), []
            for way, (low, size) in product(of_ways, (("*bf16", 2), ("*fp32", 4))):
                tiles = kernels._tiles(4096, 64, size)
                options = {key: tiles.pop(key) for key in ("num_warps", "num_stages")}
                types = dict.fromkeys(("bias", "left", "right", "y"), low) | {"a": eight, "b": eight, "factor": "fp32"}
                types |= {"a_scales": "*fp32", "b_scales": "*fp32"} | dict.fromkeys(WHOLE, "i32")
                made = compiled(
                    kernels._multiply, types, {**of_ways[way], "SUMS": sums, **tiles}, generation, **options
                )
                used |= set(EIGHT_BITS.findall(made.asm["ptx"]))
                shared.append(made.metadata.shared)
            words = ", ".join(f"`{word}`" for word in sorted(used)) or "none of 8 bits"
            rows.append({"generation": generation, "kind": kind, "instructions": sorted(used), "shared": max(shared)})
            print(f"| {name} (sm_{generation}) | {kind} | {words} | {max(shared) / 1024:.0f} KiB |", flush=True)
    return rows


MEASURES: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
    "losses": measure_losses,
    "subject": measure_subject,
    "products": measure_products,
    "kernels": measure_kernels,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=MEASURES)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="sd-small")
    parser.add_argument("--side", type=int, default=128, help="of the pictures of `losses`")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lorakit-compute-") as temporary:
        measured = {}
        for what in args.what:
            folder = Path(temporary) / what
            folder.mkdir()
            measured[what] = MEASURES[what](args, folder)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"at": time.time(), **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
