"""Lumina-Image 2.0: a rectified flow by one stream of picture and text, told its captions by Gemma 2 behind a prompt of
the system (Qin et al. 2025, arXiv:2503.21758).

Its backbone counts time from noise to picture and predicts the picture less the noise: both are turned round here.
Every number is read from the model's own configuration but for the length of captions, which is the stock pipeline's.
"""

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.types import Text
from lorakit.families import base, gemma, qwen, source, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("Lumina2Pipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
TOKENS = 256  # of a caption and the prompt before it: max_sequence_length of the stock pipeline
# every linear layer of the blocks, as sd-scripts has it
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "feed_forward.linear_1",
    "feed_forward.linear_2",
    "feed_forward.linear_3",
    "norm1.linear",
)
# names here to those of the published layout, where queries, keys and values are one layer
_OUTSIDE = {
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_INSIDE = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_BLOCK = re.compile(r"((layers|noise_refiner|context_refiner)\.\d+\.)")
# Z-Image has blocks of the same names: its attention and, in diffusers' layout, its feed-forward are called otherwise
_STACK = r"(layers|(noise|context)_refiner)[._]\d+[._]"
_OURS = rf"{_STACK}(attn\.|feed_forward\.linear_|norm1\.)|time_caption_embed\.|norm_out\.|x_embedder\."
_PUBLISHED = rf"{_STACK}(attention[._](qkv|out)|feed_forward[._]w|adaLN_modulation[._]1)|(x|t|cap)_embedder|final_layer"
_KEY = re.compile(rf"transformer\.({_OURS})|(lora_unet_|diffusion_model\.)({_PUBLISHED})")


class Settings(source.Settings):
    family: Literal["lumina2"] = "lumina2"
    """Lumina-Image 2.0, and what is built like it."""
    system_prompt: str | None = None
    """What Gemma reads before each caption, in training and when pictures are drawn. Left out: what diffusers says; a
    model that was trained further may have its own."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = source.described(settings, PARTS, PIPELINES)
    config, factor = model.config("transformer"), vae.factor(model.folder)
    system, tokenizer = _system_prompt(settings), gemma.load_tokenizer(model.folder / "tokenizer")
    return transformer.describe(
        model,
        Lumina2,
        factor=factor,
        channels=model.config("vae")["latent_channels"],
        patch=config["patch_size"],
        resolution=factor * config["sample_size"],
        token_limit=TOKENS,
        count_tokens=lambda caption: gemma.count_tokens(tokenizer, _prompted(system, caption)),
        text_size=TOKENS * (model.config("text_encoder")["hidden_size"] + 1),
    )


def _system_prompt(settings: Settings) -> str:
    from diffusers import Lumina2Pipeline

    stock = Lumina2Pipeline(transformer=None, scheduler=None, vae=None, text_encoder=None, tokenizer=None)
    return stock.system_prompt if settings.system_prompt is None else settings.system_prompt


def _prompted(system: str, caption: str) -> str:
    """What Gemma reads of a caption; nothing of an empty one, see gemma.py."""
    return f"{system} <Prompt Start> {caption}" if caption else ""


def load(settings: Settings) -> "Lumina2":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return Lumina2(model, system_prompt=_system_prompt(settings))


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import Lumina2Transformer2DModel

    return Names(components) if isinstance(components.get("transformer"), Lumina2Transformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "lumina2"
    backbone = "transformer"
    # text encoders: no loader takes adapters of Gemma
    lora_prefixes = {"transformer": "lora_unet_"}

    def original_name(self, component: str, path: str) -> str:
        block = _BLOCK.match(path)
        if block:
            rest = path[block.end() :]
            return f"{block[1]}{_INSIDE.get(rest, rest)}"
        return _OUTSIDE.get(path, path)

    @functools.cached_property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        blocks = {
            block[1] for path, _ in self.components["transformer"].named_modules() if (block := _BLOCK.match(path))
        }
        return {
            f"transformer.{block}attention.qkv": tuple(f"transformer.{block}{part}" for part in _QKV)
            for block in sorted(blocks)
        }


class Lumina2(Names, base.Frozen):
    """The family `lumina2`; see `protocol.Family`."""

    default_targets = {"transformer": TARGETS}
    default_format = "diffusers"
    stock_formats = ("diffusers",)
    pipelines = {"text": "Lumina2Pipeline"}

    def __init__(self, model: source.Source, *, system_prompt: str) -> None:
        from diffusers import Lumina2Transformer2DModel
        from transformers import Gemma2Model  # without a head, if the files have one

        parts = model.components(transformer=Lumina2Transformer2DModel, text_encoder=Gemma2Model)
        self.transformer, self.text_encoder = parts["transformer"], parts["text_encoder"]
        super().__init__(model, parts, patch=self.transformer.config.patch_size)
        self.tokenizer = gemma.load_tokenizer(model.folder / "tokenizer")
        self.system_prompt = system_prompt
        self.reading = {"text_encoder": system_prompt}
        self.process = transformer.process(model)
        self.token_limit = TOKENS

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), the last but one of Gemma, "mask": (B, L), 1 for the caption's tokens}."""
        qwen.refuse_weights("Lumina 2", weighted=weighted)
        texts = [_prompted(self.system_prompt, caption) for caption in captions]
        states, mask = gemma.encode(self.tokenizer, self.text_encoder, texts, limit=TOKENS, layer=-2)
        return {"states": states, "mask": mask}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        return -self.transformer(
            x_t.to(self.dtype),
            timestep=1 - t,
            encoder_hidden_states=text["states"].to(self.dtype),
            encoder_attention_mask=text["mask"],
        ).sample

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(self, task, tokenizer=self.tokenizer)
        pipeline.system_prompt = self.system_prompt
        return pipeline

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "lumina2", "modelspec.architecture": "lumina-2/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys may be for this family; one of feed-forward layers alone, in kohya's
    names, may be for Z-Image too."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys)


@functools.cache
def tiny() -> Lumina2:
    """A random instance that runs in milliseconds; VAE factor 8, which the stock pipeline takes for granted."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-lumina2-"))
    tokenizer = gemma.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=4,
                in_channels=8,
                hidden_size=32,
                num_layers=2,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(300, 64, 64),
                cap_feat_dim=16,
            ),
            vae=vae.tiny(levels=4, latent_channels=8, shift_factor=0.1),
            text_encoder=gemma.tiny(tokenizer),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
