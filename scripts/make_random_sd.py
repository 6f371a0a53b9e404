"""Writes a pipeline of Stable Diffusion 1.5, XL or 3.5, or of FLUX.1 dev, with random weights, to try a whole
training run on without any download.

The folder has the layout of the published model: the backbone's blocks, VAE of factor 8, CLIP with 77 tokens. Its
pictures are noise. The tokenizers are made here: byte-level like CLIP's, with a few plain words and no other merges;
for T5, of printable characters.

    python scripts/make_random_sd.py --out runs/random-sd                 narrow, some 4 MB, trains in seconds on a CPU
    python scripts/make_random_sd.py --out runs/random-small --size small between them, 90 MB, for timings on a CPU
    python scripts/make_random_sd.py --out runs/random-sd15 --size full   the true sizes, 2 GB in fp16
    python scripts/make_random_sd.py --out runs/random-sdxl --model sdxl  narrow; with --size full 7 GB
    python scripts/make_random_sd.py --out runs/random-sd35 --model sd3   narrow; with --size full 3.5-medium, 16 GB
    python scripts/make_random_sd.py --out runs/random-flux --model flux  narrow; with --size full 34 GB
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENS = 77
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "at",
    "with",
    "and",
    "photo",
    "picture",
    "dog",
    "cat",
    "red",
    "green",
    "blue",
]
# what differs between the sizes; everything else is the published configuration. Text encoders: width, width within,
# layers, heads. SD 3's transformer: layers, those with two attentions, heads, a head's width; FLUX's: heads, how wide
# each is by axis, blocks of two streams and of one
SIZES = {
    "tiny": {
        "sd": {"channels": (16, 32, 48, 48), "heads": 4, "depths": 1},
        "sdxl": {"channels": (16, 32, 48), "heads": (2, 4, 6), "depths": (1, 1, 2)},
        "sd3": {"blocks": (3, 2, 2, 16), "t5": (96, 128, 2, 2)},
        "flux": {"heads": 2, "axes": (4, 6, 6), "blocks": (2, 3), "t5": (48, 64, 2, 2)},
        "groups": 8,
        "text": ((32, 64, 2, 2), (48, 96, 2, 2)),
        "vae": (8, 8, 16, 16),
        "time": 16,
    },
    "small": {
        "sd": {"channels": (64, 128, 256, 256), "heads": 8, "depths": 1},
        "groups": 32,
        "text": ((256, 1024, 4, 4), (256, 1024, 4, 4)),
        "vae": (32, 64, 128, 128),
        "time": 64,
    },
    "full": {
        "sd": {"channels": (320, 640, 1280, 1280), "heads": 8, "depths": 1},
        "sdxl": {"channels": (320, 640, 1280), "heads": (5, 10, 20), "depths": (1, 2, 10)},
        "sd3": {"blocks": (24, 13, 24, 64), "t5": (4096, 10240, 24, 64)},
        "flux": {"heads": 24, "axes": (16, 56, 56), "blocks": (19, 38), "t5": (4096, 10240, 24, 64)},
        "groups": 32,
        "text": ((768, 3072, 12, 12), (1280, 5120, 32, 20)),
        "vae": (128, 256, 512, 512),
        "time": 256,
    },
}


def byte_letters() -> list[str]:
    """The 256 characters that CLIP's vocabulary writes bytes with: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


def make_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A tokenizer for the stock class, filled up with `pad`; WORDS are one token each, others fall into letters."""
    letters = byte_letters()
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    merges = list(dict.fromkeys(merges))
    entries = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, rules = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}, ensure_ascii=False), "utf-8")
    rules.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(rules), model_max_length=TOKENS, pad_token=pad)


def text_config(tokenizer: CLIPTokenizer, sizes: tuple[int, int, int, int], *, act: str) -> CLIPTextConfig:
    hidden, intermediate, layers, heads = sizes
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        projection_dim=hidden,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make(out: Path, *, model: str = "sd", size: str, seed: int, dtype: torch.dtype) -> None:
    """Writes the pipeline to `out`; the same bytes for the same arguments."""
    torch.manual_seed(seed)
    if model == "flux":
        make_flux(out, SIZES[size], dtype)
        return
    if model == "sd3":
        make_sd3(out, SIZES[size], dtype)
        return
    chosen = SIZES[size]
    own, sdxl = chosen[model], model == "sdxl"
    first, second = chosen["text"]
    tokenizer = make_tokenizer(out / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=128 if sdxl else 64,
        in_channels=4,
        out_channels=4,
        block_out_channels=own["channels"],
        layers_per_block=2,
        norm_num_groups=chosen["groups"],
        attention_head_dim=own["heads"],
        transformer_layers_per_block=own["depths"],
        cross_attention_dim=first[0] + second[0] if sdxl else first[0],
        **(xl_blocks(chosen["time"], pooled=second[0]) if sdxl else {}),
    ).to(dtype)
    vae = AutoencoderKL(
        block_out_channels=chosen["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=chosen["groups"],
        latent_channels=4,
        sample_size=1024 if sdxl else 512,
        scaling_factor=0.13025 if sdxl else 0.18215,
    )
    text_encoder = CLIPTextModel(text_config(tokenizer, first, act="quick_gelu"))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if sdxl:
        tokenizer_2 = make_tokenizer(out / "tokenizer_2", pad="!")
        pipeline = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, second, act="gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **schedule),
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.to(dtype=dtype).save_pretrained(out, safe_serialization=True)


def make_sd3(out: Path, chosen: dict, dtype: torch.dtype) -> None:
    (first, second), third = chosen["text"], chosen["sd3"]["t5"]
    layers, dual, heads, width = chosen["sd3"]["blocks"]
    tokenizer, tokenizer_2 = make_tokenizer(out / "tokenizer"), make_tokenizer(out / "tokenizer_2", pad="!")
    tokenizer_3 = make_t5_tokenizer()
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            num_layers=layers,
            dual_attention_layers=tuple(range(dual)),
            num_attention_heads=heads,
            attention_head_dim=width,
            caption_projection_dim=heads * width,
            joint_attention_dim=third[0],
            pooled_projection_dim=first[0] + second[0],
            pos_embed_max_size=384,
            qk_norm="rms_norm",
        ).to(dtype),
        vae=wide_vae(chosen, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, first, act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer_2, second, act="gelu")),
        text_encoder_3=make_t5(tokenizer_3, third),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).to(dtype=dtype).save_pretrained(out, safe_serialization=True)


def make_t5_tokenizer() -> T5TokenizerFast:
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    return T5TokenizerFast(vocab=letters, extra_ids=0)


def make_t5(tokenizer: T5TokenizerFast, sizes: tuple[int, int, int, int]) -> T5EncoderModel:
    width, within, layers, heads = sizes
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // heads,
            d_ff=within,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
        )
    )


def wide_vae(chosen: dict, *, scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """Of 16 channels."""
    return AutoencoderKL(
        block_out_channels=chosen["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=chosen["groups"],
        latent_channels=16,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_flux(out: Path, chosen: dict, dtype: torch.dtype) -> None:
    own, text = chosen["flux"], chosen["text"][0]
    tokenizer, tokenizer_2 = make_tokenizer(out / "tokenizer"), make_t5_tokenizer()
    double, single = own["blocks"]
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=sum(own["axes"]),
            num_attention_heads=own["heads"],
            joint_attention_dim=own["t5"][0],
            pooled_projection_dim=text[0],
            guidance_embeds=True,
            axes_dims_rope=own["axes"],
        ).to(dtype),
        vae=wide_vae(chosen, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(text_config(tokenizer, text, act="quick_gelu")),
        text_encoder_2=make_t5(tokenizer_2, own["t5"]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    ).to(dtype=dtype).save_pretrained(out, safe_serialization=True)


def xl_blocks(time: int, *, pooled: int) -> dict[str, object]:
    """What the U-Net of XL has otherwise: three levels, no attention at the first, and the embedded sizes."""
    return {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time,
        "projection_class_embeddings_input_dim": 6 * time + pooled,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", choices=("sd", "sdxl", "sd3", "flux"), default="sd")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    args = parser.parse_args(arguments)
    if args.model not in SIZES[args.size]:
        parser.error(f"there is no {args.model} of the size {args.size}")
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"error: {args.out} is in use: name a new folder")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    make(args.out, model=args.model, size=args.size, seed=args.seed, dtype=dtype)
    total = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"wrote {args.out}, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
