"""How long one training step of the embedded base takes, in the ways that might have made it faster.

A step is that of scripts/make_base.py: U-Net and text encoder forward and backward, batch 32 at 16×16 latents, AdamW.
What is measured: single precision, bf16 autocast, channels-last memory, torch.compile; docs/design/log.md says what
came out.

    python scripts/bench_base_step.py                  all of them, a few minutes on one core
    python scripts/bench_base_step.py fp32 bf16
"""

import argparse
import contextlib
import statistics
import time

import torch
from make_base import TOKENS, new_unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

WAYS = ("fp32", "bf16", "channels_last", "compile")
VOCABULARY = 700


def text_encoder() -> CLIPTextModel:
    """The base's, with a made-up vocabulary: its size hardly matters for the time."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )


def seconds_per_step(way: str, *, batch: int, steps: int) -> tuple[float, float]:
    """Median wall seconds of a step, and the seconds of the first one (where torch.compile compiles)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": text_encoder()})
    if way == "channels_last":
        model["unet"].to(memory_format=torch.channels_last)
    unet = torch.compile(model["unet"]) if way == "compile" else model["unet"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    taken = []
    for _ in range(steps + 2):
        x = torch.randn(batch, 4, 16, 16)
        if way == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        t, ids = torch.randint(0, 1000, (batch,)), torch.randint(0, VOCABULARY, (batch, TOKENS))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if way == "bf16" else contextlib.nullcontext():
            predicted = unet(x, t, model["text_encoder"](ids).last_hidden_state).sample
        (predicted.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:]), taken[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    unknown = set(args.ways) - set(WAYS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(WAYS)}")
    torch.set_num_threads(args.threads)
    for way in args.ways or WAYS:
        step, first = seconds_per_step(way, batch=args.batch, steps=args.steps)
        print(f"{way:14} {step:.3f} s a step, the first {first:.1f} s", flush=True)


if __name__ == "__main__":
    main()
