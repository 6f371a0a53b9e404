"""How fast data are prepared, beside the plain ways of doing it; docs/performance.md has what came out.

    python scripts/bench_data.py decode --photos DIR    photographs to pixels of a bucket, beside plain Pillow
    python scripts/bench_data.py cache                  latents written and read, beside an .npz file an image
    python scripts/bench_data.py scan --photos DIR      a folder of many pictures, looked at twice
    python scripts/bench_data.py memory                 what a million examples take

Times are the CPU's, of this process and of what it waits for, in one thread. Sides take turns in short rounds; a ratio
is the median over rounds, with the lowest and the highest in brackets.
"""

import argparse
import gc
import io
import math
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lorakit.core.types import Example, Place
from lorakit.data.buckets import Bucket, BucketSettings, bucket_ids, make_buckets
from lorakit.data.images import Cut, pixels, prepare_picture

ROUNDS = 10
LANCZOS = Image.Resampling.LANCZOS


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for line in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(line) + " |", flush=True)
    print(flush=True)


def seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def ratio(plain: Sequence[float], ours: Sequence[float]) -> str:
    """How many times faster than `plain`, round by round."""
    found = [a / b for a, b in zip(plain, ours, strict=True)]
    return f"{statistics.median(found):.2f} × ({min(found):.2f} … {max(found):.2f})"


# decode


def plain(data: bytes, side: int) -> torch.Tensor:
    """What anybody would write: decode, turn upright, resize to cover, cut out the middle."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return pixels(covered(image, side))


def plain_draft(data: bytes, side: int) -> torch.Tensor:
    """The same of a JPEG decoded at the smallest scale that leaves twice the side."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (2 * side, 2 * side))
    return pixels(covered(ImageOps.exif_transpose(image).convert("RGB"), side))


def covered(image: Image.Image, side: int) -> Image.Image:
    scale = max(side / image.width, side / image.height)
    width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((width, height), LANCZOS).crop((left, top, left + side, top + side))


def ours(data: bytes, side: int) -> torch.Tensor:
    return prepare_picture(data, Cut(Bucket(side, side))).pixels


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """In decibels, of 8-bit pictures; identical ones count as 99."""
    error = float(((a - b).double() * 127.5).square().mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0


def photographs(folder: Path, *, least: int, side: int | None) -> list[bytes]:
    """JPEGs in `folder` of at least `least` pixels a side, as they are or scaled to `side`."""
    found = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            if side is None and min(image.size) >= least:
                found.append(path.read_bytes())
            elif side is not None:
                scale = side / min(image.size)
                scaled = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)), LANCZOS)
                buffer = io.BytesIO()
                scaled.save(buffer, "JPEG", quality=92)
                found.append(buffer.getvalue())
    if not found:
        raise SystemExit(f"{folder} holds no JPEG of {least} pixels a side")
    return found


def bench_decode(args: argparse.Namespace) -> None:
    rows = []
    for side, target in ((None, 256), (None, 512), (2048, 1024), (2048, 512), (4096, 1024), (4096, 512), (4096, 128)):
        pictures = photographs(args.photos, least=2 * target, side=side)
        n = args.images if side is None else max(len(pictures), args.images // 10)
        sides = (plain, plain_draft, ours)
        times: dict[Callable[..., torch.Tensor], list[float]] = {way: [] for way in sides}
        done = 0
        for turn in range(ROUNDS):
            share = range(done, n * (turn + 1) // ROUNDS)
            done = share.stop
            spent = dict.fromkeys(sides, 0.0)
            for i in share:
                for way in sides:
                    spent[way] += seconds(partial(way, pictures[i % len(pictures)], target))
            for way in sides:
                times[way].append(spent[way])
        quality = {
            way: [psnr(way(picture, target), plain(picture, target)) for picture in pictures] for way in sides[1:]
        }
        rows.append(
            [
                "as they are" if side is None else f"scaled to {side}",
                str(target),
                str(n),
                f"{n / sum(times[plain]):.1f}",
                f"{n / sum(times[ours]):.1f}",
                ratio(times[plain], times[ours]),
                f"{statistics.median(quality[ours]):.1f} ({min(quality[ours]):.1f})",
                ratio(times[plain], times[plain_draft]),
                f"{statistics.median(quality[plain_draft]):.1f} ({min(quality[plain_draft]):.1f})",
            ]
        )
    table(
        ["photographs", "side", "images", "plain, images/s", "lorakit, images/s", "faster", "PSNR, dB (lowest)",
         "draft at 2 ×, faster", "its PSNR, dB (lowest)"],
        rows,
    )  # fmt: skip


# cache


def bench_cache(args: argparse.Namespace) -> None:
    from lorakit.data.shards import Cache, content_key

    draw = torch.Generator().manual_seed(0)
    count, batch = args.images, 32
    latents = torch.randn(count, 4, 64, 64, generator=draw)
    keys = [content_key("bench", i) for i in range(count)]
    order = torch.randperm(count, generator=draw).tolist()
    chosen = [order[i : i + batch] for i in range(0, count, batch)]
    folder = Path(tempfile.mkdtemp(prefix="bench-cache-"))
    times: dict[str, list[float]] = {name: [] for name in ("npz write", "write", "npz read", "read", "stacked")}
    try:
        for turn in range(5):
            plain_folder, own = folder / f"npz-{turn}", Cache(folder / f"own-{turn}")
            plain_folder.mkdir()

            def write_plain(to: Path = plain_folder) -> None:
                for key, value in zip(keys, latents, strict=True):
                    np.savez(to / f"{key}.npz", latents=value.numpy())

            def write_own(to: Cache = own) -> None:
                for start in range(0, count, 1024):
                    part = range(start, min(start + 1024, count))
                    to.write({keys[i]: {"latents": latents[i]} for i in part})

            def read_plain(of: Path = plain_folder) -> None:
                for numbers in chosen:
                    torch.stack([torch.from_numpy(np.load(of / f"{keys[i]}.npz")["latents"]) for i in numbers])

            def read_own(of: Cache = own) -> None:
                for numbers in chosen:
                    torch.stack([entry["latents"] for entry in of.read_many([keys[i] for i in numbers])])

            def read_stacked(of: Cache = own) -> None:
                for numbers in chosen:
                    of.read_stacked([keys[i] for i in numbers])

            actions = (write_plain, write_own, read_plain, read_own, read_stacked)
            for name, action in zip(times, actions, strict=True):
                times[name].append(seconds(action))
            shutil.rmtree(plain_folder)
            shutil.rmtree(own.folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    def each(name: str) -> str:
        return f"{statistics.median(times[name]) / count * 1e6:.0f} µs"

    table(
        [f"{count} latents of 4×64×64, fp32", ".npz an image", "lorakit", "faster"],
        [
            ["written, each", each("npz write"), each("write"), ratio(times["npz write"], times["write"])],
            [f"read in random batches of {batch}, each", each("npz read"), each("read"),
             ratio(times["npz read"], times["read"])],
            ["the same, stacked by the cache", each("npz read"), each("stacked"),
             ratio(times["npz read"], times["stacked"])],
        ],
    )  # fmt: skip


# scan


def bench_scan(args: argparse.Namespace) -> None:
    from lorakit.data.scan import scan
    from lorakit.data.sources import SourceSettings

    folder = Path(tempfile.mkdtemp(prefix="bench-scan-"))
    try:
        pictures = photographs(args.photos, least=1, side=args.side)
        (folder / "photos").mkdir()
        for i in range(args.images):
            # a comment behind the end of the JPEG makes each a file of its own
            (folder / "photos" / f"{i:05d}.jpg").write_bytes(pictures[i % len(pictures)] + str(i).encode())
            (folder / "photos" / f"{i:05d}.txt").write_text(f"picture number {i}")
        time.sleep(2.5)  # what was written a moment ago is not taken for unchanged
        rows = []
        for name in ("first", "second, nothing changed", "third, nothing changed"):
            began, cpu = time.perf_counter(), time.process_time()
            found = scan([SourceSettings(path=str(folder / "photos"))], cache=folder / "cache")
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            assert len(found.examples) == args.images and not found.problems, found.problems[:3]
            rows.append([name, f"{wall:.2f} s", f"{cpu:.2f} s"])
        table([f"scan of {args.images} pictures of {args.side} px", "time", "CPU time"], rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# memory


def resident() -> float:
    """MB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def bench_memory(args: argparse.Namespace) -> None:
    from lorakit.data.examples import ExamplesBuilder
    from lorakit.data.plan import Draw, Plan

    count = args.images
    gc.collect()
    before, began = resident(), time.process_time()
    rows = []

    def note(what: str) -> None:
        gc.collect()
        rows.append([what, f"{resident() - before:.0f} MB", f"{time.process_time() - began:.1f} s"])

    draw = np.random.default_rng(0)
    sides = draw.integers(600, 4000, (count, 2))
    builder = ExamplesBuilder()
    for i in range(count):
        width, height = sides[i].tolist()
        caption = f"a photograph of subject number {i:07d}, in the open, on an overcast day, seen from the left, sharp"
        name = f"0/a-folder-with-a-name/of-some-length/and-another-one/photographs-of-{i // 1000:04d}/{i:08d}.jpg"
        place = Place(name[2:])
        builder.add(
            Example(name, 0, place, (caption,), (width, height), f"{i:064x}", look=i * 0x9E3779B97F4A7C15 % 2**128)
        )
    examples = builder.build()
    del builder, sides
    note("examples")
    buckets = make_buckets(BucketSettings(resolution=1024, max_upscale=4.0), side_multiple=8)
    ids = bucket_ids(np.asarray(examples.sizes), buckets, max_upscale=4.0)
    note("buckets")
    plan = Plan(examples.keys, examples.sources, ids, buckets=buckets, draws=[Draw()], seed=0, global_batch=8)
    plan.at(0)
    note("plan, first step")
    plan.at(plan.steps_per_epoch)
    note("plan, first step of the second epoch")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rows.append(["highest of the process, torch and all", f"{peak:.0f} MB", ""])
    table([f"{count} examples", "memory", "CPU time so far"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "cache", "scan", "memory"])
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, for decode and scan")
    parser.add_argument("--images", type=int, help="how many; absent: 1,000, scan 10,000, memory 1,000,000")
    parser.add_argument("--side", type=int, default=64, help="of the pictures that are scanned, in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.images = args.images or {"scan": 10_000, "memory": 1_000_000}.get(args.what, 1000)
    if args.photos is None and args.what in ("decode", "scan"):
        parser.error(f"{args.what} needs --photos DIR")
    {"decode": bench_decode, "cache": bench_cache, "scan": bench_scan, "memory": bench_memory}[args.what](args)


if __name__ == "__main__":
    main()
