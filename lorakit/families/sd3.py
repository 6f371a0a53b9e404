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
from torch import Tensor, nn

from lorakit.core import settings as core_settings
from lorakit.core.quiet import quiet_libraries
from lorakit.core.types import Text
from lorakit.families import clip, emphasis, folders, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("StableDiffusion3Pipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
T5 = {"text_encoder_3": "config.json", "tokenizer_3": "tokenizer_config.json"}
_MEDIUM = 24  # layers of both mediums; large has 38
# FLUX's and Qwen-Image's attention has the same names: what they have beside it tells them apart
_BLOCK = r"transformer_blocks\.\d+\.(attn2?|ff|ff_context|norm1|norm1_context)"
_OUTSIDE = "pos_embed|time_text_embed|context_embedder|norm_out|proj_out"
_KEY = re.compile(rf"(transformer\.({_OUTSIDE}|{_BLOCK})|text_encoder(_2)?)\.")


class Settings(core_settings.Settings):
    family: Literal["sd3"] = "sd3"
    """Stable Diffusion 3 and 3.5, medium and large."""
    path: str
    """A diffusers folder or a hub name."""
    max_sequence_length: int = Field(256, ge=1, le=512)
    """How many tokens of a caption T5 reads; the CLIP encoders read 77 in any case. Other programs draw with 256."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizers."""
    folder = folders.resolve(settings.path, weights=False)
    with_t5 = _check(folder, weights=Path(settings.path).is_dir())
    backbone = folders.read_config(folder, "transformer")
    encoders = [folders.read_config(folder, part) for part in StableDiffusion3.text_encoders]
    tokenizer = clip.load_tokenizer(folder / "tokenizer")
    limit = tokenizer.model_max_length
    text_size = sum(limit * config["hidden_size"] + config["projection_dim"] for config in encoders)
    if with_t5:
        tokenizer, limit = t5.load_tokenizer(folder / "tokenizer_3"), settings.max_sequence_length
        text_size += limit * folders.read_config(folder, "text_encoder_3")["d_model"]
    factor = vae.factor(folder)
    return transformer.describe(
        folder,
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
    folder = folders.resolve(settings.path)
    with_t5 = _check(folder)
    return StableDiffusion3(folder, max_sequence_length=settings.max_sequence_length, with_t5=with_t5)


def _check(folder: Path, *, weights: bool = True) -> bool:
    """Whether the model in `folder`, which has all else, has T5."""
    folders.check(folder, PARTS, pipelines=PIPELINES, weights=weights)
    named, _ = folders.read_config(folder, "", "model_index.json").get("text_encoder_3") or (None, None)
    if named is not None:
        folders.check(folder, T5, pipelines=PIPELINES, weights=weights)
    return named is not None


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import SD3Transformer2DModel

    return Names(components) if isinstance(components.get("transformer"), SD3Transformer2DModel) else None


class Names:
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sd3"
    backbone = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")  # no loader takes adapters of T5
    lora_prefixes: Mapping[str, str] = {}
    fused: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        self.text_encoders = tuple(name for name in self.text_encoders if name in self.components)

    def original_name(self, component: str, path: str) -> str:
        return path if component == "transformer" else clip.published_name(path)


class StableDiffusion3(Names):
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

    def __init__(self, path: Path, *, max_sequence_length: int, with_t5: bool) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        quiet_libraries()
        self.path = path
        self.dtype = torch.float32
        self.max_sequence_length = max_sequence_length
        self.transformer = folders.load_component(SD3Transformer2DModel, path / "transformer")
        self.vae = vae.load(path)
        self.text_encoder = folders.load_component(CLIPTextModelWithProjection, path / "text_encoder")
        self.text_encoder_2 = folders.load_component(CLIPTextModelWithProjection, path / "text_encoder_2")
        self.text_encoder_3 = t5.load(path / "text_encoder_3") if with_t5 else None
        self.tokenizer = clip.load_tokenizer(path / "tokenizer")
        self.tokenizer_2 = clip.load_tokenizer(path / "tokenizer_2")
        self.tokenizer_3 = t5.load_tokenizer(path / "tokenizer_3") if with_t5 else None
        self.process = transformer.process(path)
        names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        super().__init__({name: getattr(self, name) for name in names})
        self.factor = vae.factor(path)
        self.side_multiple = self.drawing_multiple = self.factor * self.transformer.config.patch_size
        self.token_limit = max_sequence_length if with_t5 else self.tokenizer.model_max_length
        for module in self.components.values():
            module.requires_grad_(False).eval()

    def to(self, device: Any, dtype: Any) -> None:
        self.dtype = dtype
        for name, module in self.components.items():
            module.to(device=device, dtype=torch.float32 if name == "vae" else dtype)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean, shifted and scaled: (B, C, H/f, W/f)."""
        return vae.encode(self.vae, pixels)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

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
        import diffusers

        scheduler = folders.read_config(self.path, "scheduler", transformer.SCHEDULER)
        pipeline = getattr(diffusers, self.pipelines[task])(
            transformer=self.transformer,
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            text_encoder_3=self.text_encoder_3,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            tokenizer_3=self.tokenizer_3,
            scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
        )
        pipeline.set_progress_bar_config(disable=True)
        return t5.with_limit(pipeline, self.max_sequence_length)

    def stock_pipeline(self) -> Any:
        from diffusers import StableDiffusion3Pipeline

        # without these words it would ask for a T5 that the folder does not have
        absent = {} if self.text_encoder_3 is not None else {"text_encoder_3": None, "tokenizer_3": None}
        return folders.load_pipeline(StableDiffusion3Pipeline, self.path, self.components, **absent)

    def metadata(self) -> dict[str, str]:
        config: Any = self.components["transformer"].config
        size = "large" if config.num_layers > _MEDIUM else "medium"
        return {"ss_base_model_version": "sd3m", "modelspec.architecture": f"stable-diffusion-3-{size}/lora"}

    def fingerprint(self, component: str) -> str:
        if not component.startswith("text_encoder"):
            return folders.fingerprint(self.path / component)
        own = folders.fingerprint(self.path / component, self.path / component.replace("text_encoder", "tokenizer"))
        return f"{own}-{self.max_sequence_length}" if component == "text_encoder_3" else own

    def recognises(self, keys: Iterable[str]) -> bool:
        return recognises(keys)


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
