"""Trains the embedded base model from scratch and writes it to data/base.

Four stages, each skipped when its result lies in --work already: tokenizer, VAE, U-Net with text encoder, export.
Training is seeded and checkpointed; run the command again after an interruption and it goes on, bit for bit (at equal
thread count). Everything is drawn on the way by scripts/scenes.py: no picture is read.

    python scripts/make_base.py                      about an hour on one core
    python scripts/make_base.py --smoke --out /tmp/b a minute, to see that all stages work
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import scenes
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorakit.diffusion import GaussianDiffusion

TOKENS = 32
VOCABULARY = 900
LATENT_STD = 1.5  # of the raw latents; the pipeline's scaling factor is its inverse
LOGVAR = -6.0  # of the posterior before whitening: fixed, so that sampling the posterior hardly blurs

# plain words, so that captions of one's own do not fall apart into letters
WORDS = """a an the of on in at with and to from by is are two three one photo picture image drawing painting sketch
dog cat bird horse car toy tree flower person man woman child face hand house street city beach snow grass wood water
sky sun night day sitting standing running lying looking wearing holding playing front back side left right top bottom
middle close up background table floor wall window door room garden park road mountain sea river old new little large
bright dark light soft round long short style subject creature monster animal small big red green blue yellow white
black orange purple pink brown grey teal circle square triangle star cross house"""


def pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size as (B, 3, H, W) in -1 … 1."""
    import numpy as np

    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    aside = path.with_suffix(".tmp")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, aside)
    os.replace(aside, path)


def write_log(work: Path, log: list[dict]) -> None:
    (work / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


# -- tokenizer ----------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, words end in </w>) fitted to the scenes' captions and a few plain words."""
    rng = random.Random(0)
    captions = [scenes.random_scene(rng).caption for _ in range(2000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions + WORDS.split() * 20, trainer)
    learned = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) for m in learned["merges"]]
    entries = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


# -- VAE ----------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )
    structure(vae)
    return vae


@torch.no_grad()
def structure(vae: AutoencoderKL) -> None:
    """Starts the VAE as a 4×4 mean and a nearest-neighbour enlargement of RGB.

    A plain initialisation stalls near 17 dB. RGB travels as pairs (x, -x), since silu(x) - silu(-x) = x, and a pair of
    large constants keeps the group norms from dividing the brightness away.
    """

    def carry(conv: nn.Conv2d, kernel: Tensor, channels: int = 8) -> None:
        for c in range(channels):
            conv.weight[c] = 0
            conv.weight[c, c] = kernel
            conv.bias[c] = 0

    def enter(conv: nn.Conv2d) -> None:
        constant = math.sqrt(conv.out_channels / 2)
        conv.weight[:8] = 0
        conv.bias[:8] = 0
        middle = conv.kernel_size[0] // 2
        for c in range(3):
            conv.weight[c, c, middle, middle] = 1
            conv.weight[c + 3, c, middle, middle] = -1
        conv.bias[6], conv.bias[7] = constant, -constant

    def leave(conv: nn.Conv2d) -> None:
        conv.weight[:3] = 0
        conv.bias[:3] = 0
        for c in range(3):
            conv.weight[c, c, 1, 1] = 1
            conv.weight[c, c + 3, 1, 1] = -1

    point = torch.zeros(3, 3)
    point[1, 1] = 1
    mean = torch.zeros(3, 3)
    mean[:2, :2] = 0.25
    for half in (vae.encoder, vae.decoder):
        enter(half.conv_in)
        leave(half.conv_out)
        for name, module in half.named_modules():
            if name.endswith("conv2"):
                module.weight.zero_()
                module.bias.zero_()
            elif name.endswith("conv_shortcut"):
                carry(module, torch.ones(1, 1))
            elif name.endswith("downsamplers.0.conv"):
                carry(module, mean)
            elif name.endswith("upsamplers.0.conv"):
                carry(module, point)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight[:4] = torch.eye(4, conv.in_channels)[:, :, None, None]
        conv.bias.zero_()
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = LOGVAR


def train_vae(*, steps: int, device: str, log: list[dict]) -> AutoencoderKL:
    torch.manual_seed(1)
    rng = random.Random(1)
    vae = new_vae().to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    started = time.process_time()
    for step in range(steps):
        frame = scenes.random_frame(rng)
        x = pixels([busy_picture(frame, rng) for _ in range(8)]).to(device)
        mean = vae.quant_conv(vae.encoder(x))[:, :4]
        # noise as the posterior's and a U-Net's small errors will bring it
        z = mean + 0.06 * mean.detach().std() * torch.randn_like(mean)
        y = vae.decoder(vae.post_quant_conv(z))
        mse = (y - x).square().mean()
        loss = mse + 0.1 * (y - x).abs().mean() + 1e-4 * mean.square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss.backward()
        vae.quant_conv.weight.grad[4:] = 0
        vae.quant_conv.bias.grad[4:] = 0
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            psnr = 10 * math.log10(4 / mse.item())
            log.append({"stage": "vae", "step": step, "psnr": round(psnr, 2)})
            print(f"vae {step} psnr {psnr:.1f} dB, {time.process_time() - started:.0f} CPU s", flush=True)
    whiten(vae, rng, device)
    return vae.eval()


def busy_picture(frame: tuple[int, int], rng: random.Random) -> Image.Image:
    """A scene, half the time with more shapes on it in any colour, so that the VAE is not confined to the captions."""
    from PIL import ImageDraw

    picture = scenes.draw(scenes.random_scene(rng), frame, rng)
    if rng.random() < 0.5:
        return picture
    large = picture.resize((frame[0] * 3, frame[1] * 3))
    pen = ImageDraw.Draw(large)
    for _ in range(rng.randint(1, 5)):
        x, y, r = rng.uniform(0, large.width), rng.uniform(0, large.height), rng.uniform(6, 50)
        kind = rng.choice((pen.ellipse, pen.rectangle))
        kind([x - r, y - r * rng.uniform(0.4, 1), x + r, y + r], fill=tuple(rng.randint(0, 255) for _ in range(3)))
    return large.resize(frame, Image.Resampling.BOX)


@torch.no_grad()
def whiten(vae: AutoencoderKL, rng: random.Random, device: str) -> None:
    """Folds a whitening of the latent channels into the 1×1 convolutions on both sides of them."""
    means = []
    for _ in range(40):
        x = pixels([scenes.draw(scenes.random_scene(rng), (64, 64), rng) for _ in range(16)]).to(device)
        means.append(vae.quant_conv(vae.encoder(x))[:, :4].permute(0, 2, 3, 1).reshape(-1, 4))
    latents = torch.cat(means).double()
    centre = latents.mean(0)
    values, vectors = torch.linalg.eigh((latents - centre).T.cov())
    forward = LATENT_STD * vectors @ values.rsqrt().diag() @ vectors.T
    weight = vae.quant_conv.weight[:4, :, 0, 0].double()
    bias = vae.quant_conv.bias[:4].double()
    vae.quant_conv.weight[:4, :, 0, 0] = (forward @ weight).float()
    vae.quant_conv.bias[:4] = (forward @ (bias - centre)).float()
    after = vae.post_quant_conv.weight[:, :, 0, 0].double()
    vae.post_quant_conv.bias.copy_((vae.post_quant_conv.bias.double() + after @ centre).float())
    vae.post_quant_conv.weight[:, :, 0, 0] = (after @ torch.linalg.inv(forward)).float()
    vae.register_to_config(scaling_factor=1 / LATENT_STD)


# -- U-Net and text encoder ---------------------------------------------------------------------------------------


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=128,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


Pool = dict[tuple[int, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def draw_pool(number: int, size: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: str) -> Pool:
    """Pool `number` of freshly drawn scenes: for each frame its latents and token ids."""
    rng = random.Random(1000 + number)
    pool: Pool = {}
    for frame, share in scenes.FRAMES.items():
        drawn = [scenes.random_scene(rng) for _ in range(max(64, int(size * share)))]
        latents = []
        for i in range(0, len(drawn), 32):
            x = pixels([scenes.draw(s, frame, rng) for s in drawn[i : i + 32]]).to(device)
            latents.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
        ids = tokenizer([s.caption for s in drawn], padding="max_length", return_tensors="pt").input_ids
        pool[frame] = (torch.cat(latents).half(), ids.to(device))
    return pool


def train_unet(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer, log: list[dict]) -> dict:
    """The trained, averaged weights of U-Net and text encoder under `unet.` and `text_encoder.`."""
    torch.manual_seed(2)
    process = GaussianDiffusion.from_scheduler_config(dict(new_scheduler().config))
    model = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}).to(args.device)
    parameters = dict(model.named_parameters())
    # the foreach and fused forms agree in value; fused is the faster one on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {k: v.detach().clone() for k, v in parameters.items()}
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0].to(args.device)
    first = 0
    saved = args.work / "unet.safetensors"
    if saved.exists():
        first = restore(saved, parameters, average, optimizer)
    pool: Pool = {}
    pool_number = -1
    losses: list[float] = []
    for step in range(first, args.steps):
        if step // args.redraw != pool_number:
            pool_number = step // args.redraw
            pool = draw_pool(pool_number, args.pool, vae, tokenizer, args.device)
        g = torch.Generator().manual_seed(7_000_000 + step)
        frame = random.Random(step).choices(list(scenes.FRAMES), list(scenes.FRAMES.values()))[0]
        latents, ids = pool[frame]
        index = torch.randint(len(latents), (args.batch,), generator=g)
        x0, ids = latents[index.to(args.device)].float(), ids[index.to(args.device)]
        dropped = (torch.rand(args.batch, generator=g) < 0.1).to(args.device)
        ids = torch.where(dropped[:, None], empty, ids)
        # stratified over the batch: one t from each of `batch` equal slices of the range
        u = (torch.randperm(args.batch, generator=g) + torch.rand(args.batch, generator=g)) / args.batch
        t = (u * process.timesteps).long().clamp(max=process.timesteps - 1).to(args.device)
        noise = torch.randn(x0.shape, generator=g).to(args.device)
        states = model["text_encoder"](ids).last_hidden_state
        predicted = model["unet"](process.q_sample(x0, t, noise), t, states).sample
        loss = (predicted - process.target(x0, t, noise)).square().mean()
        lr = args.lr * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            log.append({"stage": "unet", "step": step + 1, "loss": round(sum(losses) / len(losses), 5), "lr": lr})
            losses.clear()
            print(f"unet {step + 1} loss {log[-1]['loss']:.4f} {time.process_time():.0f} CPU s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            keep(saved, step + 1, parameters, average, optimizer)
            write_log(args.work, log)
    return average


def keep(path: Path, step: int, parameters: dict, average: dict, optimizer: torch.optim.Optimizer) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = average[name]
        tensors[f"first.{name}"] = state["exp_avg"]
        tensors[f"second.{name}"] = state["exp_avg_sq"]
    write_safetensors(tensors, path)


@torch.no_grad()
def restore(path: Path, parameters: dict, average: dict, optimizer: torch.optim.Optimizer) -> int:
    tensors = load_file(path)
    step = int(tensors["step"])
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        average[name].copy_(tensors[f"average.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"first.{name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
        }
    return step


def export(out: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, weights: dict, log: list[dict]) -> None:
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    for name, module in (("unet.", unet), ("text_encoder.", text_encoder)):
        own = {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        assert not unexpected and all("position_ids" in m for m in missing)
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    for config in out.glob("*/config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        if "dtype" in entries:
            # transformers loads in the type named here and diffusers in fp32: a pipeline of two types cannot draw
            entries["dtype"] = "float32"
        config.write_text(json.dumps(entries, indent=2) + "\n")
    (out / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/base"))
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="intermediate results, to go on from")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--pool", type=int, default=12000, help="scenes drawn at a time")
    parser.add_argument("--redraw", type=int, default=600, help="steps that a pool serves")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="few steps: does every stage work?")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.vae_steps, args.pool, args.redraw, args.save_every = 6, 6, 64, 3, 3
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "log.jsonl"
    log = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    tokenizer = make_tokenizer(args.work / "tokenizer")
    vae_folder = args.work / "vae"
    if (vae_folder / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(vae_folder).to(args.device).eval()
    else:
        vae = train_vae(steps=args.vae_steps, device=args.device, log=log)
        vae.save_pretrained(vae_folder)
        write_log(args.work, log)
    weights = train_unet(args, vae, tokenizer, log)
    export(args.out, vae, tokenizer, weights, log)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"wrote {args.out}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
