"""How the cost of a training grows with pictures, resolution and processes; docs/scaling.md has what came out.

    python scripts/scaling.py pictures      what is kept of so many pictures, and the plan of their epochs
    python scripts/scaling.py resolution    a micro step at several sizes
    python scripts/scaling.py processes     a micro step on several processes, each with the model or with a part of it
    python scripts/scaling.py sums          the exchange of gradients, beside a gather of all of them
    python scripts/scaling.py model         what none of it measures: a hundred to ten million pictures, many GPUs

`pictures` runs `bench_data.py memory`. Steps are forward and backward of one picture through `sd-small` (a U-Net of 64
to 256 channels, random weights, rank 8, fp32), one thread a process. Times are medians; CPU times of one process.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.append(str(Path(__file__).parent / "bench"))
from bench_data import table
from shapes import base

from lorakit import families
from lorakit.adapters import ADAPTERS, trainable_parameters
from lorakit.core.processes import sum_tensors
from lorakit.core.settings import Settings
from lorakit.families.protocol import Family
from lorakit.training import sharding

ROUNDS = 3
RANK = 8
COUNTS = (100, 10_000, 1_000_000)
SIDES = (128, 256, 384)
SUMS = (1_000_000, 10_000_000)  # numbers in fp32


def measured(action: Callable[[], object], *, rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of the seconds that pass, and of this process's CPU seconds, after a first call that is not counted."""
    action()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def adapted(path: Path, quantize: str | None = None) -> Family:
    family = families.load("sd", str(path), quantize=quantize)
    kind = ADAPTERS.module("lora")
    settings: Settings = kind.Settings(rank=RANK)
    backbone = family.components[family.backbone]
    kind.inject(backbone, settings, targets=family.default_targets[family.backbone], seed=0)
    backbone.train()
    return family


def micro_step(family: Family, side: int) -> Callable[[], object]:
    x_t = torch.randn(1, *family.latent_shape(side, side))
    text = {name: tensor.detach() for name, tensor in family.encode_text(["a photograph"]).items()}
    return lambda: family.predict(x_t, torch.tensor([500]), text).square().mean().backward()


def pictures() -> None:
    for count in COUNTS:
        script = Path(__file__).parent / "bench_data.py"
        subprocess.run([sys.executable, str(script), "memory", "--images", str(count)], check=True)
        print()


def resolution() -> None:
    with tempfile.TemporaryDirectory() as folder:
        family = adapted(base("sd-small", Path(folder)))
        rows, first = [], 0.0
        for side in SIDES:
            _, cpu = measured(micro_step(family, side))
            first = first or cpu / side**2
            rows.append([f"{side}", f"{cpu:.2f} s", f"{cpu / side**2 / first:.2f}"])
        table(["side", "a micro step, CPU", "per pixel, of the first"], rows)


def processes() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = base("sd-small", Path(folder))
        for count, shared, bits in (
            (1, False, None),
            (2, False, None),
            (2, True, None),
            (1, False, "nf4"),
            (2, True, "nf4"),
        ):
            wall, cpu, frozen = on_ranks(count, step_of_rank, path, shared, bits)
            held = ("a part" if shared else "whole") + (f", {bits}" if bits else "")
            rows.append([str(count), held, f"{frozen:.1f} MB", f"{wall:.2f} s", f"{cpu:.2f} s"])
    table(["processes", "the model", "frozen weights in each", "a micro step", "CPU, of one process"], rows)


def step_of_rank(path: Path, shared: bool, quantize: str | None) -> tuple[float, float, float]:
    family = adapted(path, quantize)
    backbone = family.components[family.backbone]
    trained = [*trainable_parameters({family.backbone: backbone}).values()]
    frozen = sum(p.nbytes for p in backbone.parameters() if not p.requires_grad)
    if shared:
        sharding.shard(backbone, trained, torch.device("cpu"))
        frozen = sum(p.to_local().nbytes for p in backbone.parameters() if not p.requires_grad)
    return *measured(micro_step(family, 256)), frozen / 1e6


def sums() -> None:
    rows = []
    for numbers in SUMS:
        for count in (2, 3, 4):
            ours, gathered = on_ranks(count, sum_of_rank, numbers)
            heard = 8 * numbers * (count - 1) / count / 1e6, 4 * numbers * (count - 1) / 1e6
            rows.append(
                [f"{numbers:,}", str(count), *(f"{m:.0f} MB" for m in heard), f"{ours:.2f} s", f"{gathered:.2f} s"]
            )
    head = ["numbers", "processes", "each hears", "of a gather", "summed in", "by a gather"]
    table(head, rows)


# numbers and bytes of one picture of 1024 px and of one caption in the cache, as the families' shapes make them
STORED = {
    "SDXL": (4 * 128 * 128 * 4, (77 * 2048 + 1280) * 2),
    "FLUX": (16 * 128 * 128 * 4, (512 * 4096 + 768) * 2),
}
SCAN, PLAN = 1.13e-3, 353e-6  # CPU seconds and MB a picture, docs/performance.md
WEIGHTS = 23_000_000  # of a large adapter, in fp32
LINKS = {"within a machine, 200 GB/s": 200e9, "between machines, 25 GB/s": 25e9, "10 Gbit/s": 1.25e9}


def model() -> None:
    rows = []
    for power in range(2, 8):
        count = 10**power
        stored = [f"{count * sum(sizes) / 1e9:,.1f} GB" for sizes in STORED.values()]
        rows.append([f"{count:,}", f"{count * SCAN:,.1f} s", f"{count * PLAN:,.1f} MB", *stored])
    table(["pictures", "first look, CPU", "memory of examples and plan", *(f"cache, {name}" for name in STORED)], rows)
    print()
    rows = []
    for count in (2, 8, 64, 512):
        heard = 8 * WEIGHTS * (count - 1) / count
        rows.append([str(count), f"{heard / 1e6:.0f} MB", *(f"{heard / rate * 1e3:.1f} ms" for rate in LINKS.values())])
    table(["processes", "each hears a step", *LINKS], rows)


def sum_of_rank(numbers: int) -> tuple[float, float]:
    tensor = torch.randn(numbers, generator=torch.Generator().manual_seed(dist.get_rank()))
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]

    def gather() -> None:
        dist.all_gather(parts, tensor)
        total = parts[0]
        for part in parts[1:]:
            total += part

    return measured(lambda: sum_tensors([tensor]))[0], measured(gather)[0]


def on_ranks(count: int, action: Callable[..., Sequence[float]], *arguments: object) -> Sequence[float]:
    """What `action` returns on the first of `count` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (count, port, answers, action, arguments), nprocs=count)
    return answers.get()


def _rank(
    rank: int, count: int, port: int, answers: object, action: Callable[..., object], arguments: Sequence[object]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    found = action(*arguments)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pictures", "resolution", "processes", "sums", "model"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    globals()[parser.parse_args().what]()


if __name__ == "__main__":
    main()
