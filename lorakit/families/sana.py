"""Sana 1.0 and 1.5: a rectified flow by linear attention on latents of a far smaller picture, told its captions by
Gemma 2 behind an instruction to enrich them (Xie et al. 2024, arXiv:2410.10629; 2025, arXiv:2501.18427).

Every number is read from the model's own configuration but for the length of captions, which is the stock pipeline's,
as is the instruction.
"""

import dataclasses
import functools
import inspect
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Text
from lorakit.families import base, gemma, qwen, source, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("SanaPipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
TOKENS = 300  # that the backbone reads of a caption: max_sequence_length of the stock pipeline
DRAWN = 32  # the stock pipeline draws sides that are multiples of this, whatever the VAE is
_SPRINT = "SanaSprintPipeline"
# PixArt's attention has the same names; its feed-forward layers are linear
_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.to_|ff\.conv_)"
_KEY = re.compile(rf"transformer\.({_BLOCK}|patch_embed\.proj\.|time_embed\.|caption_projection\.|proj_out\.)")


class Settings(source.Settings):
    family: Literal["sana"] = "sana"
    """Sana 1.0 and 1.5, of any size."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = _no_sprint(source.described(settings, PARTS, (*PIPELINES, _SPRINT)))
    config, factor = model.config("transformer"), vae.factor(model.folder)
    tokenizer, limit = _tokenizer(model)
    found = transformer.describe(
        model,
        Sana,
        factor=factor,
        channels=config["in_channels"],
        patch=config["patch_size"],
        resolution=factor * config["sample_size"],
        token_limit=limit,
        count_tokens=lambda caption: gemma.count_tokens(tokenizer, _instructed(caption)),
        text_size=TOKENS * (model.config("text_encoder")["hidden_size"] + 1),
    )
    return dataclasses.replace(found, drawing_multiple=math.lcm(found.side_multiple, DRAWN))


def _no_sprint(model: source.Source) -> source.Source:
    if model.config("", "model_index.json")["_class_name"] == _SPRINT:
        raise InputError(
            f"model.path = {printable(model.folder)} is SanaSprint, which was distilled to draw in few steps and is no "
            "flow: give the Sana that it was made from."
        )
    return model


@functools.cache
def _instruction() -> str:
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def _instructed(caption: str) -> str:
    """What Gemma reads of a caption, in lower case; nothing of an empty one, see gemma.py."""
    caption = caption.lower().strip()
    return _instruction() + caption if caption else ""


def _tokenizer(model: source.Source) -> tuple[Any, int]:
    """The tokenizer, and how many tokens Gemma reads of the instruction and a caption.

    The first of the caption's tokens may be one with the instruction's last, so that two of TOKENS are not its own.
    """
    tokenizer = gemma.load_tokenizer(model.folder / "tokenizer")
    return tokenizer, gemma.count_tokens(tokenizer, _instruction()) + TOKENS - 2


def load(settings: Settings) -> "Sana":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    return Sana(_no_sprint(source.opened(settings, PARTS, (*PIPELINES, _SPRINT))))


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import SanaTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), SanaTransformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`.

    There are no names for kohya's layout, and no loader takes adapters of Gemma.
    """

    name = "sana"
    backbone = "transformer"


class Sana(Names, base.Frozen):
    """The family `sana`; see `protocol.Family`."""

    # every layer of the blocks that has no groups
    default_targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point")}
    default_format = "diffusers"
    stock_formats = ("diffusers",)
    pipelines = {"text": "SanaPipeline"}

    def __init__(self, model: source.Source) -> None:
        from diffusers import AutoencoderDC, SanaTransformer2DModel
        from transformers import Gemma2Model  # without a head, if the files have one

        kinds = {"transformer": SanaTransformer2DModel, "text_encoder": Gemma2Model}
        parts = model.components(**kinds, vae=AutoencoderDC)
        self.transformer, self.text_encoder = (parts[name] for name in kinds)
        super().__init__(model, parts, patch=self.transformer.config.patch_size)
        self.drawing_multiple = math.lcm(self.side_multiple, DRAWN)
        self.tokenizer, self.token_limit = _tokenizer(model)
        self.process = transformer.process(model)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to what the VAE makes of them, which is no distribution, scaled: (B, C, H/f,
        W/f)."""
        latent: Tensor = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent
        return latent * self.vae.config.scaling_factor

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), Gemma's last, "mask": (B, L), 1 for the caption's tokens}.

        Of the instruction there is the start alone, and its last token.
        """
        qwen.refuse_weights("Sana", weighted=weighted)
        texts, limit = [_instructed(caption) for caption in captions], self.token_limit
        states, mask = gemma.encode(self.tokenizer, self.text_encoder, texts, limit=limit)
        read = [[0, *range(limit - TOKENS + 1, limit)] if text else [*range(TOKENS)] for text in texts]
        kept = torch.arange(len(texts))[:, None], torch.tensor(read)
        return {"states": states[kept], "mask": mask[kept]}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        return self.transformer(
            x_t.to(self.dtype),
            encoder_hidden_states=text["states"].to(self.dtype),
            encoder_attention_mask=text["mask"],
            timestep=t * self.process.timesteps * self.transformer.config.timestep_scale,
        ).sample

    def live_pipeline(self, task: str = "text") -> Any:
        """Where no size is said the stock pipeline takes 1024 pixels; this one the model's own."""
        side = self.factor * self.transformer.config.sample_size
        return base.drawing_as_asked(base.pipeline(self, task, tokenizer=self.tokenizer), side)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline takes no None for a negative prompt."""
        return {"guidance_scale": scale, "negative_prompt": negative_prompt}

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "sana", "modelspec.architecture": "sana/lora"}

    def fingerprint(self, component: str) -> str:
        own = super().fingerprint(component)
        # another diffusers may instruct otherwise
        return f"{own}-{_instruction()}" if component == "text_encoder" else own


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys may be for this family; one of attention alone may be for PixArt too."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys)


@functools.cache
def tiny() -> Sana:
    """A random instance that runs in milliseconds; VAE factor 4."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sana-"))
    tokenizer = gemma.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in {
                "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
                "block_out_channels": (8, 8, 16),
                "layers_per_block": (1, 1, 1),
                "qkv_multiscales": ((), (), (5,)),
            }.items()
        }
        SanaPipeline(
            transformer=SanaTransformer2DModel(
                sample_size=16,
                in_channels=8,
                out_channels=8,
                num_layers=2,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                timestep_scale=2.0,
            ),
            vae=AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.2, **autoencoder),
            text_encoder=gemma.tiny(tokenizer),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
