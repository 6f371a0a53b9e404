"""Stable Diffusion 1.x and 2.x: a latent U-Net with one CLIP text encoder (Rombach et al., arXiv:2112.10752).

Every number (VAE factor, scaling, prediction type, token limit) is read from the model's own configuration.
"""

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.core.types import Task, Text
from lorakit.families import base, clip, emphasis, sgm, source, unet, vae
from lorakit.families.protocol import Description

TASKS: Mapping[Task, Mapping[str, str]] = {
    "text": {
        "text": "StableDiffusionPipeline",
        "image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    "inpaint": {"inpaint": "StableDiffusionInpaintPipeline"},
    "edit": {"edit": "StableDiffusionInstructPix2PixPipeline"},
}
PIPELINES = tuple(pipelines[task] for task, pipelines in TASKS.items())
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
# kohya's files call every backbone lora_unet_, so what stands behind it has to be a U-Net's
_KEY = re.compile(
    r"lora_unet_((down|up)_blocks|mid_block|conv_(in|out)|(time|class)_embedding)[._]|lora_te1?_|(unet|text_encoder)\."
)


class Settings(unet.Settings):
    family: Literal["sd"] = "sd"
    """Stable Diffusion 1.x or 2.x."""
    path: str = "embedded"
    """A diffusers folder, a hub name, or "embedded" for the small base that ships with lorakit."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = source.described(settings, PARTS, PIPELINES)
    return unet.describe(model, StableDiffusion, chunks=settings.caption_chunks)


def load(settings: Settings) -> "StableDiffusion":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return StableDiffusion(model, chunks=settings.caption_chunks)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet, text_encoder = components.get("unet"), components.get("text_encoder")
    one_encoder = isinstance(text_encoder, CLIPTextModel | None) and "text_encoder_2" not in components
    return Names(components) if isinstance(unet, UNet2DConditionModel) and one_encoder else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sd"
    backbone = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}

    def original_name(self, component: str, path: str) -> str:
        return clip.published_name(path) if component == "text_encoder" else path

    def single_file_key(self, component: str, path: str) -> tuple[str, int, int]:
        if component == "unet":
            return sgm.single_file_key(path, self.components["unet"].config)
        return clip.single_file_key(path, "cond_stage_model")


class StableDiffusion(Names, unet.Model):
    """The family `sd`; see `protocol.Family`."""

    default_targets = {
        "unet": unet.TARGETS,
        "text_encoder": clip.TARGETS,
    }
    stock_options = {"safety_checker": None}
    default_format = "kohya"
    stock_formats = ("diffusers", "kohya")
    tasks = TASKS

    def __init__(self, model: source.Source, *, chunks: int) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        super().__init__(model, model.components(unet=UNet2DConditionModel, text_encoder=CLIPTextModel))
        self.text_encoder = self.components["text_encoder"]
        self.tokenizer = clip.load_tokenizer(model.folder / "tokenizer")
        self.chunks, self.token_limit = chunks, clip.long_limit(self.tokenizer, chunks)
        self.reading = {"text_encoder": chunks} if chunks > 1 else {}

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D)}, CLIP's last hidden states after its final norm; captions are cut at L tokens."""
        ids, present, weights = clip.tokens(self.tokenizer, captions, weighted=weighted, chunks=self.chunks)
        device = self.text_encoder.device
        mask = present.to(device) if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        last = self.text_encoder(ids.to(device), attention_mask=mask).last_hidden_state
        states = clip.joined(last, self.chunks)
        if weights is not None:
            states = emphasis.weigh(states, clip.joined(weights.to(device), self.chunks))
        return {"states": states}

    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None, beside: Tensor | None = None
    ) -> Tensor:
        states = text["states"].to(self.dtype)
        return self.unet(self.sample(x_t, beside), t, encoder_hidden_states=states).sample

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(
            self,
            task,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return unet.with_chunks(pipeline, self) if self.chunks > 1 else pipeline

    def metadata(self) -> dict[str, str]:
        second = self.unet.config.cross_attention_dim == 1024  # the width of OpenCLIP-H, which SD 2 reads
        return {
            "ss_base_model_version": "sd_v2" if second else "sd_v1",
            "ss_v2": str(second),
            "modelspec.architecture": f"stable-diffusion-v{2 if second else 1}/lora",
        }


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys) and not sgm.is_xl(keys)


@functools.cache
def tiny(task: Task = "text") -> StableDiffusion:
    """A random instance that runs in milliseconds: VAE factor 4, 16 tokens, folder under the system's temporary one."""
    import diffusers
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sd-"))
    tokenizer = clip.tiny_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = UNet2DConditionModel(
            sample_size=8,
            in_channels=unet.channels(task, 4),
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=2,
            cross_attention_dim=24,
        )
        autoencoder = vae.tiny()
        text_encoder = CLIPTextModel(clip.tiny_config(tokenizer))
    getattr(diffusers, TASKS[task][task])(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=backbone,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
