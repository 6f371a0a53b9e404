"""Stable Diffusion 3 and 3.5: a rectified flow by a transformer that attends to picture and text together, told its
captions by two CLIP encoders and T5 (Esser et al., arXiv:2403.03206).

A folder may be without T5, as many keep it: zeros stand for its states then. Without either CLIP the stock pipeline
draws nothing, so a folder that lacks one is refused. Every number is read from the model's own configuration.
"""

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lorakit.core.types import Text
from lorakit.families import base, clip, emphasis, source, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("StableDiffusion3Pipeline",)
TOKENIZERS = ("tokenizer", "tokenizer_2")
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
    "scheduler": base.SCHEDULER,
}
T5 = {"text_encoder_3": "config.json", "tokenizer_3": "tokenizer_config.json"}
_MEDIUM = 24  # layers of both mediums; large has 38
# FLUX's and Qwen-Image's attention has the same names: what they have beside it tells them apart, or more blocks
_BLOCK = r"transformer_blocks\.([12]?\d|3[0-7])\.(attn2?|ff|ff_context|norm1|norm1_context)"
_OUTSIDE = "pos_embed|time_text_embed|context_embedder|norm_out|proj_out"
_KEY = re.compile(rf"(transformer\.({_OUTSIDE}|{_BLOCK})|text_encoder(_2)?)\.")


class Settings(source.Settings):
    family: Literal["sd3"] = "sd3"
    """Stable Diffusion 3 and 3.5, medium and large."""
    max_sequence_length: int = Field(256, ge=1, le=512)
    """How many tokens of a caption T5 reads; the CLIP encoders read 77 in any case. Other programs draw with 256."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizers."""
    model = source.described(settings, PARTS, PIPELINES, optional=T5)
    backbone = model.config("transformer")
    encoders = [model.config(part) for part in StableDiffusion3.text_encoders]
    tokenizer = clip.load_tokenizer(model.folder / "tokenizer")
    limit = tokenizer.model_max_length
    text_size = sum(limit * config["hidden_size"] + config["projection_dim"] for config in encoders)
    if model.has("text_encoder_3"):
        tokenizer, limit = t5.load_tokenizer(model.folder / "tokenizer_3"), settings.max_sequence_length
        text_size += limit * model.config("text_encoder_3")["d_model"]
    factor = vae.factor(model.folder)
    return transformer.describe(
        model,
        StableDiffusion3,
        factor=factor,
        channels=backbone["in_channels"],
        patch=backbone["patch_size"],
        resolution=factor * backbone["sample_size"],
        token_limit=limit,
        count_tokens=functools.partial(clip.count_tokens, tokenizer),
        text_size=text_size,
    )


def load(settings: Settings) -> "StableDiffusion3":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES, optional=T5)
    return StableDiffusion3(model, max_sequence_length=settings.max_sequence_length)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import SD3Transformer2DModel

    return Names(components) if isinstance(components.get("transformer"), SD3Transformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sd3"
    backbone = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")  # no loader takes adapters of T5

    def original_name(self, component: str, path: str) -> str:
        return path if component == "transformer" else clip.published_name(path)


class StableDiffusion3(Names, base.Frozen):
    """The family `sd3`; see `protocol.Family`."""

    default_targets = {
        "transformer": transformer.TARGETS,
        "text_encoder": clip.TARGETS,
        "text_encoder_2": clip.TARGETS,
    }
    default_format = "diffusers"
    stock_formats = ("diffusers",)
    pipelines = {
        "text": "StableDiffusion3Pipeline",
        "image": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
    }

    def __init__(self, model: source.Source, *, max_sequence_length: int) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        kinds = {"transformer": SD3Transformer2DModel, **dict.fromkeys(self.text_encoders, CLIPTextModelWithProjection)}
        if model.has("text_encoder_3"):
            kinds["text_encoder_3"] = T5EncoderModel
        super().__init__(model, model.components(**kinds), patch=model.config("transformer")["patch_size"])
        self.transformer = self.components["transformer"]
        self.text_encoder, self.text_encoder_2 = (self.components[name] for name in self.text_encoders)
        self.text_encoder_3 = self.components.get("text_encoder_3")
        self.tokenizer, self.tokenizer_2 = (clip.load_tokenizer(model.folder / part) for part in TOKENIZERS)
        self.tokenizer_3 = None if self.text_encoder_3 is None else t5.load_tokenizer(model.folder / "tokenizer_3")
        self.process = transformer.process(model)
        self.max_sequence_length = max_sequence_length
        self.reading = {"text_encoder_3": max_sequence_length}
        self.token_limit = self.tokenizer.model_max_length if self.text_encoder_3 is None else max_sequence_length

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D + D₂), "pooled": (B, P + P₂)} of both CLIP encoders and, with T5, {"t5": (B, L₃, D₃)}.

        States are CLIP's last but one side by side, without a final norm, and T5's last, whose padding counts.
        """
        states, pooled = [], []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            ids, _, weights = clip.tokens(tokenizer, captions, weighted=weighted)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            last = output.hidden_states[-2]
            states.append(last if weights is None else emphasis.weigh(last, weights.to(last.device)))
            pooled.append(output.text_embeds)
        text = {"states": torch.cat(states, dim=-1), "pooled": torch.cat(pooled, dim=-1)}
        if self.text_encoder_3 is None:
            return text
        limit = self.max_sequence_length
        last, _ = t5.encode(self.tokenizer_3, self.text_encoder_3, captions, limit=limit, weighted=weighted)
        return {**text, "t5": last}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        width, states = self.transformer.config.joint_attention_dim, text["states"]
        long = text["t5"] if "t5" in text else states.new_zeros(len(states), self.max_sequence_length, width)
        states = torch.cat([F.pad(states, (0, width - states.shape[-1])), long], dim=1)
        return self.transformer(
            x_t.to(self.dtype),
            encoder_hidden_states=states.to(self.dtype),
            pooled_projections=text["pooled"].to(self.dtype),
            timestep=t * self.process.timesteps,
        ).sample

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(
            self,
            task,
            text_encoder_3=self.text_encoder_3,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            tokenizer_3=self.tokenizer_3,
        )
        return t5.with_limit(pipeline, self.max_sequence_length)

    @property
    def stock_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        # without these words it would ask for a T5 that the folder does not have
        return {} if self.text_encoder_3 is not None else {"text_encoder_3": None, "tokenizer_3": None}

    def metadata(self) -> dict[str, str]:
        config: Any = self.components["transformer"].config
        size = "large" if config.num_layers > _MEDIUM else "medium"
        return {"ss_base_model_version": "sd3m", "modelspec.architecture": f"stable-diffusion-3-{size}/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    return all(_KEY.match(key) for key in keys) and any(key.startswith("transformer.") for key in keys)


@functools.cache
def tiny() -> StableDiffusion3:
    """A random instance that runs in milliseconds, with T5 and a block of each kind; VAE factor 4, 16 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sd3-"))
    tokenizer = clip.tiny_tokenizer(folder / "first")
    tokenizer_2 = clip.tiny_tokenizer(folder / "second", pad="!")
    tokenizer_3 = t5.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                in_channels=8,
                out_channels=8,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=64,
                pooled_projection_dim=16 + 20,
                pos_embed_max_size=32,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
            vae=vae.tiny(latent_channels=8, shift_factor=0.1),
            text_encoder=CLIPTextModelWithProjection(clip.tiny_config(tokenizer, projection_dim=16)),
            text_encoder_2=CLIPTextModelWithProjection(clip.tiny_config(tokenizer_2, width=32, projection_dim=20)),
            text_encoder_3=t5.tiny(tokenizer_3, width=64),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
