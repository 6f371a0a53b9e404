"""FLUX.1 dev and schnell: a rectified flow by a transformer on picture and text, told its captions by T5 and, in one
vector, by CLIP (Black Forest Labs 2024; the code is their only paper).

dev was distilled from guided predictions and is told the guidance instead. Every number is read from the model's own
configuration.
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

from lorakit.core.errors import InputError
from lorakit.core.types import Text
from lorakit.families import base, bfl, clip, packing, source, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("FluxPipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
_LATENTS = 128  # along a side, at the size the stock pipeline draws where none is said: no configuration says it
_KEY = re.compile(r"lora_(unet|te1?)_|(transformer|diffusion_model)\.(?!distilled)|text_encoder\.")
# Chroma has the same blocks. These it has not, and an adapter of a whole block has the first where it has the others
_OWN = re.compile(r"lora_te1?_|text_encoder\.|time_text_embed|\bnorm(1|1_context)?\.linear|[._]mod(ulation)?[._]lin\.")
_FEED_FORWARD = re.compile(r"proj_mlp|single_transformer_blocks\.\d+\.proj_out|single_blocks[._]\d+[._]linear")


class Settings(source.Settings):
    family: Literal["flux"] = "flux"
    """FLUX.1 dev, schnell, and what is built like them."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """How many tokens of a caption T5 reads; CLIP reads 77 in any case. schnell was trained with 256."""
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The guidance that dev is told in training. Left out: 1, as sd-scripts and ai-toolkit train (the pictures are no
    guided ones; what is drawn is told its own, 3.5 by most programs). schnell is told none."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizers."""
    model = source.described(settings, PARTS, PIPELINES)
    _guidance(settings, model.config("transformer"))
    factor, limit = vae.factor(model.folder), settings.max_sequence_length
    states, pooled = (
        model.config(part)[width] for part, width in (("text_encoder_2", "d_model"), ("text_encoder", "hidden_size"))
    )
    return transformer.describe(
        model,
        Flux,
        factor=factor,
        channels=model.config("vae")["latent_channels"],
        patch=packing.PATCH,
        resolution=factor * _LATENTS,
        token_limit=limit,
        count_tokens=functools.partial(clip.count_tokens, t5.load_tokenizer(model.folder / "tokenizer_2")),
        text_size=limit * states + pooled,
    )


def load(settings: Settings) -> "Flux":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    guidance = _guidance(settings, model.config("transformer"))
    return Flux(model, max_sequence_length=settings.max_sequence_length, guidance=guidance)


def _guidance(settings: Settings, config: Mapping[str, Any]) -> float | None:
    """What the model is told, None where it is told nothing."""
    if config.get("guidance_embeds"):
        return 1.0 if settings.guidance is None else settings.guidance
    if settings.guidance is not None:
        raise InputError("model.guidance: this model is told no guidance (schnell is not): leave it out.")
    return None


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import FluxTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), FluxTransformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "flux"
    backbone = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder",)  # no loader takes adapters of T5
    lora_prefixes: Mapping[str, str] = {"transformer": "lora_unet_", "text_encoder": "lora_te1_"}

    def original_name(self, component: str, path: str) -> str:
        return bfl.published_name(path) if component == "transformer" else clip.published_name(path)

    @functools.cached_property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        return bfl.fused(self.components["transformer"], "transformer")


class Flux(Names, base.Frozen):
    """The family `flux`; see `protocol.Family`."""

    # every linear layer of the blocks, as sd-scripts and ai-toolkit have it
    default_targets = {
        "transformer": (*transformer.TARGETS, *bfl.TARGETS, *bfl.MODULATION),
        "text_encoder": clip.TARGETS,
    }
    pipelines = {"text": "FluxPipeline", "image": "FluxImg2ImgPipeline", "inpaint": "FluxInpaintPipeline"}

    def __init__(self, model: source.Source, *, max_sequence_length: int, guidance: float | None) -> None:
        from diffusers import FluxTransformer2DModel
        from transformers import CLIPTextModel, T5EncoderModel

        encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
        super().__init__(model, model.components(transformer=FluxTransformer2DModel, **encoders), patch=packing.PATCH)
        self.transformer = self.components["transformer"]
        self.text_encoder, self.text_encoder_2 = (self.components[name] for name in encoders)
        self.tokenizer = clip.load_tokenizer(model.folder / "tokenizer")
        self.tokenizer_2 = t5.load_tokenizer(model.folder / "tokenizer_2")
        self.process = transformer.process(model)
        self.guidance = guidance
        self.stock_formats = bfl.stock_formats(self.transformer)
        self.default_format = self.stock_formats[-1]
        self.token_limit = max_sequence_length
        self.reading = {"text_encoder_2": max_sequence_length}

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), T5's last, whose padding counts, "pooled": (B, P), CLIP's}."""
        ids, _, _ = clip.tokens(self.tokenizer, captions, weighted=weighted)
        pooled = self.text_encoder(ids.to(self.text_encoder.device)).pooler_output
        limit = self.token_limit
        states, _ = t5.encode(self.tokenizer_2, self.text_encoder_2, captions, limit=limit, weighted=weighted)
        return {"states": states, "pooled": pooled}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        told = {} if self.guidance is None else {"guidance": torch.full_like(t, self.guidance)}
        tokens = self.transformer(
            packing.pack(x_t.to(self.dtype)),
            encoder_hidden_states=text["states"].to(self.dtype),
            pooled_projections=text["pooled"].to(self.dtype),
            timestep=t,
            img_ids=packing.places(x_t),
            txt_ids=torch.zeros(text["states"].shape[1], 3, device=x_t.device),
            **told,
        ).sample
        return packing.unpack(tokens, *x_t.shape[-2:])

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(self, task, tokenizer=self.tokenizer, tokenizer_2=self.tokenizer_2)
        return t5.with_limit(pipeline, self.token_limit)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The scale is told to the model itself, which is led away from nothing."""
        if negative_prompt:
            raise InputError("negative_prompt: this model is led away from nothing: leave it out.")
        return {"guidance_scale": scale}

    def metadata(self) -> dict[str, str]:
        variant = "schnell" if self.guidance is None else "dev"
        return {"ss_base_model_version": "flux1", "modelspec.architecture": f"flux-1-{variant}/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys may be for this family; one of attention alone may be for Chroma too."""
    keys = list(keys)
    other = any(_FEED_FORWARD.search(key) for key in keys) and not any(_OWN.search(key) for key in keys)
    return bfl.has_blocks(keys) and all(_KEY.match(key) for key in keys) and not other


def fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the sizes of an adapter that is recognised may be of this family."""
    return bfl.generation(tensors) != 2


@functools.cache
def tiny() -> Flux:
    """A random dev that runs in milliseconds, with a block of each kind; VAE factor 4, 16 tokens of CLIP."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-flux-"))
    tokenizer, tokenizer_2 = clip.tiny_tokenizer(folder / "first"), t5.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=24,
                guidance_embeds=True,
                axes_dims_rope=(2, 2, 4),
            ),
            vae=vae.tiny(shift_factor=0.1),
            text_encoder=CLIPTextModel(clip.tiny_config(tokenizer)),
            text_encoder_2=t5.tiny(tokenizer_2, width=32),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
