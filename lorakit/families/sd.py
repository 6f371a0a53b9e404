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
from torch import Tensor, nn

from lorakit.core import settings as core_settings
from lorakit.core.quiet import quiet_libraries
from lorakit.core.types import Text
from lorakit.diffusion import GaussianDiffusion
from lorakit.families import clip, emphasis, folders, sgm, unet, vae
from lorakit.families.protocol import Description

PIPELINES = ("StableDiffusionPipeline",)
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# kohya's files call every backbone lora_unet_, so what stands behind it has to be a U-Net's
_KEY = re.compile(
    r"lora_unet_((down|up)_blocks|mid_block|conv_(in|out)|(time|class)_embedding)[._]|lora_te1?_|(unet|text_encoder)\."
)


class Settings(core_settings.Settings):
    family: Literal["sd"] = "sd"
    """Stable Diffusion 1.x or 2.x."""
    path: str = "embedded"
    """A diffusers folder, a hub name, or "embedded" for the small base that ships with lorakit."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    folder = folders.resolve(settings.path, weights=False)
    on_hub = not Path(settings.path).is_dir() and settings.path != "embedded"
    folders.check(folder, PARTS, pipelines=PIPELINES, weights=not on_hub)
    return unet.describe(folder, StableDiffusion)


def load(settings: Settings) -> "StableDiffusion":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    folder = folders.resolve(settings.path)
    folders.check(folder, PARTS, pipelines=PIPELINES)
    return StableDiffusion(folder)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet, text_encoder = components.get("unet"), components.get("text_encoder")
    one_encoder = isinstance(text_encoder, CLIPTextModel | None) and "text_encoder_2" not in components
    return Names(components) if isinstance(unet, UNet2DConditionModel) and one_encoder else None


class Names:
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sd"
    backbone = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    fused: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        self.text_encoders = tuple(name for name in self.text_encoders if name in self.components)

    def original_name(self, component: str, path: str) -> str:
        return clip.published_name(path) if component == "text_encoder" else path

    def single_file_key(self, component: str, path: str) -> tuple[str, int, int]:
        if component == "unet":
            return sgm.single_file_key(path, self.components["unet"].config)
        return clip.single_file_key(path, "cond_stage_model")


class StableDiffusion(Names):
    """The family `sd`; see `protocol.Family`."""

    default_targets = {
        "unet": unet.TARGETS,
        "text_encoder": clip.TARGETS,
    }
    default_format = "kohya"
    stock_formats = ("diffusers", "kohya")
    pipelines = {
        "text": "StableDiffusionPipeline",
        "image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }

    def __init__(self, path: Path) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        quiet_libraries()
        self.path = path
        self.dtype = torch.float32
        self.unet = folders.load_component(UNet2DConditionModel, path / "unet")
        self.vae = vae.load(path)
        self.text_encoder = folders.load_component(CLIPTextModel, path / "text_encoder")
        self.tokenizer = clip.load_tokenizer(path / "tokenizer")
        self.scheduler_config = folders.read_config(path, "scheduler", "scheduler_config.json")
        self.process = GaussianDiffusion.from_scheduler_config(self.scheduler_config)
        super().__init__({"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder})
        self.side_multiple = vae.factor(path)
        self.drawing_multiple = vae.drawing_multiple(self.side_multiple)
        self.token_limit = self.tokenizer.model_max_length
        for module in self.components.values():
            module.requires_grad_(False).eval()

    def to(self, device: Any, dtype: Any) -> None:
        self.dtype = dtype
        for name, module in self.components.items():
            module.to(device=device, dtype=torch.float32 if name == "vae" else dtype)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean, scaled: (B, C, H/f, W/f)."""
        return vae.encode(self.vae, pixels)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, height // self.side_multiple, width // self.side_multiple

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D)}, CLIP's last hidden states after its final norm; captions are cut at L tokens."""
        ids, present, weights = clip.tokens(self.tokenizer, captions, weighted=weighted)
        device = self.text_encoder.device
        mask = present.to(device) if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        states = self.text_encoder(ids.to(device), attention_mask=mask).last_hidden_state
        return {"states": states if weights is None else emphasis.weigh(states, weights.to(device))}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        return self.unet(x_t.to(self.dtype), t, encoder_hidden_states=text["states"].to(self.dtype)).sample

    def live_pipeline(self, task: str = "text") -> Any:
        import diffusers

        scheduler = getattr(diffusers, self.scheduler_config["_class_name"]).from_config(self.scheduler_config)
        pipeline = getattr(diffusers, self.pipelines[task])(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def stock_pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline

        return folders.load_pipeline(StableDiffusionPipeline, self.path, self.components, safety_checker=None)

    def metadata(self) -> dict[str, str]:
        second = self.unet.config.cross_attention_dim == 1024  # the width of OpenCLIP-H, which SD 2 reads
        return {
            "ss_base_model_version": "sd_v2" if second else "sd_v1",
            "ss_v2": str(second),
            "modelspec.architecture": f"stable-diffusion-v{2 if second else 1}/lora",
        }

    def fingerprint(self, component: str) -> str:
        parts = [component, "tokenizer"] if component == "text_encoder" else [component]
        return folders.fingerprint(*(self.path / part for part in parts))

    def recognises(self, keys: Iterable[str]) -> bool:
        return recognises(keys)


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys) and not sgm.is_xl(keys)


@functools.cache
def tiny() -> StableDiffusion:
    """A random instance that runs in milliseconds: VAE factor 4, 16 tokens, folder under the system's temporary one."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sd-"))
    tokenizer = clip.tiny_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = UNet2DConditionModel(
            sample_size=8,
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
    StableDiffusionPipeline(
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
