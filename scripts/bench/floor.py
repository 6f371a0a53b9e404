"""The floor of the measurements: the least that anybody would write to train a LoRA, with the stock libraries.

One bare loop: pictures and captions encoded beforehand, peft beside the same layers, fused AdamW, clipping, and nothing
else: no cache, no metrics, no checkpoint, no check of anything. Where there is a GPU: frozen weights in bf16 under
autocast. Run as a script it goes from nothing to its third step and says what that took:

    python scripts/bench/floor.py BASE PHOTOS --side 256 --batch 2
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import torch.nn.functional as F
from bench.meter import cpu_seconds, peak_bytes

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
FLUX_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adapted(backbone: torch.nn.Module, targets: list[str], *, rank: int) -> list[torch.nn.Parameter]:
    """Puts peft's LoRA beside the layers that end so; its weights, which alone are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), backbone)
    backbone.train()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def steps(predict: Any, trained: list[torch.nn.Parameter], inputs: Any, add_noise: Any) -> Iterator[None]:
    """An update at each turn. `inputs(step)` are (latents, noise, t, text), `predict(x_t, t, text)` answers."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    where = device()
    amp = torch.autocast("cuda", torch.bfloat16) if where.type == "cuda" else contextlib.nullcontext()
    step = 0
    while True:
        latents, noise, t, text = inputs(step)
        with amp:
            predicted = predict(add_noise(latents, noise, t), t, text)
        F.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if where.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    import numpy as np
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image, ImageOps
    from transformers import CLIPTextModel, CLIPTokenizer

    where, rng = device(), torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.base, subfolder="text_encoder", torch_dtype=dtype).to(where)
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae", torch_dtype=torch.float32).to(where)
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet", torch_dtype=dtype).to(where)
    latents, states = [], []
    with torch.no_grad():
        for file in sorted(args.photos.glob("*.jpg")):
            picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
            picture = ImageOps.fit(picture, (args.side, args.side), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            latents.append(vae.encode(pixels.to(where)).latent_dist.sample() * vae.config.scaling_factor)
            caption = file.with_suffix(".txt").read_text().strip()
            ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states.append(text_encoder(ids.to(where)).last_hidden_state)
    del vae, text_encoder

    def inputs(step: int) -> tuple[torch.Tensor, ...]:
        chosen = torch.randint(len(latents), (args.batch,), generator=rng).tolist()
        x0 = torch.cat([latents[i] for i in chosen])
        noise = torch.randn(x0.shape, generator=rng).to(where)
        t = torch.randint(1000, (args.batch,), generator=rng).to(where)
        return x0, noise, t, torch.cat([states[i] for i in chosen])

    def predict(x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return unet(x_t.to(dtype), t, text).sample

    trained = adapted(unet, TARGETS, rank=args.rank)
    loop = steps(predict, trained, inputs, scheduler.add_noise)
    next(loop)
    spent = cpu_seconds()
    next(loop)
    next(loop)
    print(json.dumps({"cpu_seconds": spent, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
