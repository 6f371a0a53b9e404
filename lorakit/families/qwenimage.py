"""Qwen-Image: a rectified flow by a transformer on picture and text, told its captions by Qwen2.5-VL (Wu et al. 2025,
arXiv:2508.02324).

Its VAE is one of films: a picture is a film of one. Every number is read from the model's own configuration but for
what the stock pipeline has built in: what a caption is put into, how much of that is cut away, and how long captions
may be.
"""

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core.types import Text
from lorakit.families import base, packing, qwen, source, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("QwenImagePipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
_LATENTS = 128  # along a side, at the size the stock pipeline draws where none is said: no configuration says it
TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
BEFORE = 34  # tokens of that before the caption, whose states the transformer never sees
_BLOCK = r"transformer_blocks[._]\d+[._](attn[._]|(img|txt)_(mlp[._]net[._]|mod[._]1))"
_OUTSIDE = r"img_in|txt_in|norm_out[._]linear|proj_out|time_text_embed[._]timestep_embedder"
_KEY = re.compile(rf"(transformer\.|diffusion_model\.|lora_unet_)({_BLOCK}|{_OUTSIDE})")
# attention of Stable Diffusion 3 has the same names, in diffusers' layout alone and in 38 blocks at most
_OWN = re.compile(r"lora_unet_|diffusion_model\.|(img|txt)_(mlp|mod|in)\b|transformer_blocks\.(3[89]|[4-9]\d)\.")


class Settings(source.Settings):
    family: Literal["qwenimage"] = "qwenimage"
    """Qwen-Image, and what is built like it."""
    max_sequence_length: int = Field(512, ge=1, le=1024)
    """How many tokens of a caption count, of what follows it in its message too."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = source.described(settings, PARTS, PIPELINES)
    factor, limit = vae.factor(model.folder), settings.max_sequence_length
    tokenizer = qwen.load_tokenizer(model.folder / "tokenizer")
    return transformer.describe(
        model,
        QwenImage,
        factor=factor,
        channels=model.config("vae")["z_dim"],
        patch=packing.PATCH,
        resolution=factor * _LATENTS,
        token_limit=limit,
        count_tokens=lambda caption: qwen.count_tokens(tokenizer, TEMPLATE.format, caption) - BEFORE,
        text_size=limit * model.config("transformer")["joint_attention_dim"] + 1,
    )


def load(settings: Settings) -> "QwenImage":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return QwenImage(model, max_sequence_length=settings.max_sequence_length)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import QwenImageTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), QwenImageTransformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "qwenimage"
    backbone = "transformer"
    # text encoders: no loader takes adapters of Qwen
    lora_prefixes = {"transformer": "lora_unet_"}


class QwenImage(Names, base.Frozen):
    """The family `qwenimage`; see `protocol.Family`."""

    # every linear layer of the blocks but the modulation, as musubi-tuner has it
    default_targets = {
        "transformer": (
            *transformer.TARGETS,
            *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
        )
    }
    default_format = "kohya"  # which says its alphas to all that read it
    stock_formats = ("diffusers", "kohya")
    pipelines = {
        "text": "QwenImagePipeline",
        "image": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
    }

    def __init__(self, model: source.Source, *, max_sequence_length: int) -> None:
        from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLForConditionalGeneration

        kinds = {"transformer": QwenImageTransformer2DModel, "text_encoder": Qwen2_5_VLForConditionalGeneration}
        super().__init__(model, model.components(vae=AutoencoderKLQwenImage, **kinds), patch=packing.PATCH)
        self.transformer, self.text_encoder = (self.components[name] for name in kinds)
        self.tokenizer = qwen.load_tokenizer(model.folder / "tokenizer")
        self.process = transformer.process(model)
        self.token_limit = max_sequence_length
        self.reading = {"text_encoder": max_sequence_length}

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean, normalised by channel: (B, C, H/f, W/f)."""
        return vae.encode(self.vae, pixels.unsqueeze(2)).squeeze(2)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return self.vae.config.z_dim, height // self.factor, width // self.factor

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), "lengths": (B,)}: the last states of Qwen of each caption's own tokens and of what
        follows it in its message."""
        qwen.refuse_weights("Qwen-Image", weighted=weighted)
        tokens = self.tokenizer(
            [TEMPLATE.format(caption) for caption in captions],
            padding=True,
            padding_side="right",  # tokens are counted from the left, padding too
            truncation=True,
            max_length=BEFORE + self.token_limit,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        output = self.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            logits_to_keep=1,  # none is of use, and there are as many as words, for each token
        )
        present = tokens.attention_mask.bool()
        return qwen.padded(
            [states[own][BEFORE:] for states, own in zip(output.hidden_states[-1], present, strict=True)]
        )

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        states = text["states"].to(self.dtype)
        present = torch.arange(states.shape[1], device=states.device) < text["lengths"].unsqueeze(1)
        height, width = x_t.shape[-2:]
        tokens = self.transformer(
            packing.pack(x_t.to(self.dtype)),
            encoder_hidden_states=states,
            encoder_hidden_states_mask=None if present.all() else present.long(),
            timestep=t,
            img_shapes=[[(1, height // packing.PATCH, width // packing.PATCH)]] * len(x_t),
        ).sample
        return packing.unpack(tokens, height, width)

    def live_pipeline(self, task: str = "text") -> Any:
        return t5.with_limit(base.pipeline(self, task, tokenizer=self.tokenizer), self.token_limit)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline guides only where it is told a negative prompt, if a blank one."""
        return {"true_cfg_scale": scale, "negative_prompt": negative_prompt if scale > 1 else None}

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "qwen_image", "modelspec.architecture": "Qwen-Image/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    return all(_KEY.match(key) for key in keys) and any(_OWN.search(key) for key in keys)


@functools.cache
def tiny() -> QwenImage:
    """A random instance that runs in milliseconds, with the published template's tokens; VAE factor 4."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-qwenimage-"))
    tokenizer = qwen.tiny_tokenizer(folder, words=re.findall(r" ?[A-Za-z]+", TEMPLATE))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(2, 2, 4),
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[0.1, -0.2, 0.3, -0.4],
                latents_std=[0.5, 0.6, 0.7, 0.8],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config={
                        "vocab_size": len(tokenizer),
                        "bos_token_id": None,
                        "eos_token_id": tokenizer.eos_token_id,
                        "hidden_size": 16,
                        "intermediate_size": 32,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 1,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                    },
                    vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 16},
                )
            ),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
