"""The floor of the measurements: the least that anybody would write to train a LoRA, with the stock libraries.

One bare loop: pictures and captions encoded beforehand, peft beside the same layers, fused AdamW, clipping, and nothing
else: no cache, no metrics, no checkpoint, no check of anything. Where there is a GPU: frozen weights in bf16 under
autocast. Stable Diffusion, XL and FLUX are each asked as diffusers' examples ask them. Run as a script it goes from
nothing to its first step and some further, and says what that took:

    python scripts/bench/floor.py BASE PHOTOS --side 256 --batch 2
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import torch.nn.functional as F
from bench.meter import clock, cpu_seconds, peak_bytes
from torch import Tensor, nn

Text = Mapping[str, Tensor]
Noised = tuple[Tensor, Tensor, Tensor]

UNET_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)"
FLUX_TARGETS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|proj_mlp"
    r"|(ff|ff_context)\.net\.(0\.proj|2)|(norm|norm1|norm1_context)\.linear)"
    r"|single_transformer_blocks\.\d+\.proj_out"
)


@dataclass(frozen=True)
class Model:
    """What of a base is trained: `predict(x_t, t, text)` asks it, and `noised(x0, noise, u)` gives x_t, t and what it
    is to say there, of numbers u (B,) in [0, 1)."""

    backbone: nn.Module
    targets: str
    predict: Callable[[Tensor, Tensor, Text], Tensor]
    noised: Callable[[Tensor, Tensor, Tensor], Noised]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind(base: Path) -> str:
    """The class of the base's stock pipeline."""
    return str(json.loads((base / "model_index.json").read_text())["_class_name"])


def model(base: Path, dtype: torch.dtype) -> Model:
    return (flux if kind(base) == "FluxPipeline" else unet)(base, dtype)


def unet(base: Path, dtype: torch.dtype) -> Model:
    """Stable Diffusion, or XL, whose U-Net is told pooled text and sizes."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    backbone = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=dtype).to(device())

    def predict(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        told = {}
        if "pooled" in text:
            height, width = (8 * side for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(x_t), device=x_t.device)
            told = {"added_cond_kwargs": {"text_embeds": text["pooled"].to(dtype), "time_ids": sizes}}
        return backbone(x_t.to(dtype), t, text["states"].to(dtype), **told).sample

    def noised(x0: Tensor, noise: Tensor, u: Tensor) -> Noised:
        t = (u * 1000).long()
        return scheduler.add_noise(x0, noise, t), t, noise

    return Model(backbone, UNET_TARGETS, predict, noised)


def flux(base: Path, dtype: torch.dtype) -> Model:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    backbone = FluxTransformer2DModel.from_pretrained(base, subfolder="transformer", torch_dtype=dtype).to(device())

    def predict(x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        shape, states = x_t.shape, text["states"].to(dtype)
        height, width = shape[-2:]
        tokens = backbone(
            FluxPipeline._pack_latents(x_t.to(dtype), *shape),
            encoder_hidden_states=states,
            pooled_projections=text["pooled"].to(dtype),
            timestep=t,
            guidance=torch.ones_like(t),
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, x_t.device, dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=x_t.device, dtype=dtype),
        ).sample
        return FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8)

    def noised(x0: Tensor, noise: Tensor, u: Tensor) -> Noised:
        share = u.view(-1, 1, 1, 1)
        return (1 - share) * x0 + share * noise, u, noise - x0

    return Model(backbone, FLUX_TARGETS, predict, noised)


def adapted(backbone: nn.Module, targets: str | list[str], *, rank: int) -> list[nn.Parameter]:
    """Puts peft's LoRA beside these layers; its weights, which alone are trained."""
    from peft import LoraConfig, inject_adapter_in_model

    backbone.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), backbone)
    backbone.train()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def steps(model: Model, trained: list[nn.Parameter], inputs: Callable[[int], Any]) -> Iterator[None]:
    """An update at each turn. `inputs(step)` are (latents, noise, u, text)."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    where = device()
    amp = torch.autocast("cuda", torch.bfloat16) if where.type == "cuda" else contextlib.nullcontext()
    step = 0
    while True:
        latents, noise, u, text = inputs(step)
        x_t, t, target = model.noised(latents, noise, u)
        with amp:
            predicted = model.predict(x_t, t, text)
        F.mse_loss(predicted.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if where.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        yield


# -- from nothing ----------------------------------------------------------------------------------------------------


def reader(base: Path, dtype: torch.dtype) -> Callable[[str], Text]:
    """What makes conditioning of a caption."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def part(number: str, encoder: Any, tokenizer: Any = CLIPTokenizer, **limit: int) -> Callable[[str], Any]:
        words = tokenizer.from_pretrained(base, subfolder=f"tokenizer{number}")
        module = encoder.from_pretrained(base, subfolder=f"text_encoder{number}", torch_dtype=dtype).to(device())

        def read(caption: str) -> Any:
            ids = words(caption, padding="max_length", truncation=True, return_tensors="pt", **limit).input_ids
            return module(ids.to(device()), output_hidden_states=True)

        return read

    first = part("", CLIPTextModel)
    if kind(base) == "FluxPipeline":
        from transformers import T5EncoderModel, T5TokenizerFast

        second = part("_2", T5EncoderModel, T5TokenizerFast, max_length=512)
        return lambda caption: {
            "states": second(caption).last_hidden_state,
            "pooled": first(caption).pooler_output,
        }
    if kind(base) == "StableDiffusionXLPipeline":
        projected = part("_2", CLIPTextModelWithProjection)

        def both(caption: str) -> Text:
            a, b = first(caption), projected(caption)
            states = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], dim=-1)
            return {"states": states, "pooled": b.text_embeds}

        return both
    return lambda caption: {"states": first(caption).last_hidden_state}


@torch.no_grad()
def encoded(base: Path, photos: Path, dtype: torch.dtype, *, side: int) -> tuple[list[Tensor], list[Text]]:
    """Latents and conditioning of the photographs, each cut to a square."""
    import numpy as np
    from diffusers import AutoencoderKL
    from PIL import Image, ImageOps

    where, read = device(), reader(base, dtype)
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32).to(where)
    shift = vae.config.get("shift_factor") or 0.0
    latents, texts = [], []
    for file in sorted(photos.glob("*.jpg")):
        picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        sample = vae.encode(pixels.to(where)).latent_dist.sample()
        latents.append((sample - shift) * vae.config.scaling_factor)
        texts.append(read(file.with_suffix(".txt").read_text().strip()))
    return latents, texts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--more", type=int, default=2, help="steps after the first")
    args = parser.parse_args(arguments)

    where, rng = device(), torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    trainee = model(args.base, dtype)
    latents, texts = encoded(args.base, args.photos, dtype, side=args.side)

    def inputs(step: int) -> tuple[Any, ...]:
        chosen = torch.randint(len(latents), (args.batch,), generator=rng).tolist()
        x0 = torch.cat([latents[i] for i in chosen])
        noise = torch.randn(x0.shape, generator=rng).to(where)
        u = torch.rand(args.batch, generator=rng).to(where)
        return x0, noise, u, {name: torch.cat([texts[i][name] for i in chosen]) for name in texts[0]}

    loop = steps(trainee, adapted(trainee.backbone, trainee.targets, rank=args.rank), inputs)
    next(loop)
    spent, each = cpu_seconds(), []
    for _ in range(args.more):
        started = clock()
        next(loop)
        each.append(clock() - started)
    print(json.dumps({"cpu_seconds": spent, "peak_bytes": peak_bytes(), "a_step": statistics.median(each)}))


if __name__ == "__main__":
    main()
