"""Stable Diffusion XL: a latent U-Net with two CLIP text encoders, which is told its pictures' sizes (Podell et al.,
arXiv:2307.01952).

Every number (VAE factor, scaling, prediction type, token limit) is read from the model's own configuration.
"""

import functools
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

PIPELINES = ("StableDiffusionXLPipeline",)
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}


class Settings(core_settings.Settings):
    family: Literal["sdxl"] = "sdxl"
    """Stable Diffusion XL and what is built like it."""
    path: str
    """A diffusers folder or a hub name."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizers."""
    folder = folders.resolve(settings.path, weights=False)
    folders.check(folder, PARTS, pipelines=PIPELINES, weights=Path(settings.path).is_dir())
    pooled = folders.read_config(folder, "text_encoder_2")["projection_dim"]
    return unet.describe(folder, StableDiffusionXL, pooled=pooled)


def load(settings: Settings) -> "StableDiffusionXL":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    folder = folders.resolve(settings.path)
    folders.check(folder, PARTS, pipelines=PIPELINES)
    return StableDiffusionXL(folder)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    unet, second = components.get("unet"), components.get("text_encoder_2")
    two_encoders = isinstance(second, CLIPTextModelWithProjection | None) and "text_encoder_2" in components
    return Names(components) if isinstance(unet, UNet2DConditionModel) and two_encoders else None


class Names:
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sdxl"
    backbone = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    fused: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        self.text_encoders = tuple(name for name in self.text_encoders if name in self.components)

    def original_name(self, component: str, path: str) -> str:
        return sgm.published_name(path, self._blocks) if component == "unet" else clip.published_name(path)

    def single_file_key(self, component: str, path: str) -> tuple[str, int, int]:
        if component == "unet":
            return sgm.single_file_key(path, self.components["unet"].config)
        if component == "text_encoder":
            return clip.single_file_key(path, "conditioner.embedders.0")
        return clip.open_clip_key(path, "conditioner.embedders.1")

    @functools.cached_property
    def _blocks(self) -> dict[str, str]:
        return sgm.blocks(self.components["unet"].config)


class StableDiffusionXL(Names):
    """The family `sdxl`; see `protocol.Family`."""

    default_targets = {
        "unet": unet.TARGETS,
        "text_encoder": clip.TARGETS,
        "text_encoder_2": clip.TARGETS,
    }
    default_format = "kohya"
    stock_formats = ("diffusers", "kohya")
    pipelines = {
        "text": "StableDiffusionXLPipeline",
        "image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    }

    def __init__(self, path: Path) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        quiet_libraries()
        self.path = path
        self.dtype = torch.float32
        self.unet = folders.load_component(UNet2DConditionModel, path / "unet")
        self.vae = vae.load(path)
        self.text_encoder = folders.load_component(CLIPTextModel, path / "text_encoder")
        self.text_encoder_2 = folders.load_component(CLIPTextModelWithProjection, path / "text_encoder_2")
        self.tokenizer = clip.load_tokenizer(path / "tokenizer")
        self.tokenizer_2 = clip.load_tokenizer(path / "tokenizer_2")
        self.scheduler_config = folders.read_config(path, "scheduler", "scheduler_config.json")
        self.process = GaussianDiffusion.from_scheduler_config(self.scheduler_config)
        # the stock pipeline's default, where the folder does not say
        self.zeros_for_empty = folders.read_config(path, "", "model_index.json").get(
            "force_zeros_for_empty_prompt", True
        )
        names = ("unet", "vae", "text_encoder", "text_encoder_2")
        super().__init__({name: getattr(self, name) for name in names})
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
        """{"states": (B, L, D + D₂), "pooled": (B, P)}; captions are cut at L tokens.

        States are the encoders' last but one side by side, without a final norm; pooled is the second's projection. An
        empty caption is zeros where the stock pipeline takes zeros for no negative prompt: what guidance leads away
        from is then what dropped captions have trained.
        """
        states = []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            ids, _, weights = clip.tokens(tokenizer, captions, weighted=weighted)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            last = output.hidden_states[-2]
            states.append(last if weights is None else emphasis.weigh(last, weights.to(last.device)))
        text = {"states": torch.cat(states, dim=-1), "pooled": output.text_embeds}
        if not self.zeros_for_empty:
            return text
        said = torch.tensor([caption != "" for caption in captions], device=self.text_encoder.device)
        return {name: x.where(said.view(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x)) for name, x in text.items()}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        if sizes is None:
            height, width = (side * self.side_multiple for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), 6)
        return self.unet(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=text["states"].to(self.dtype),
            added_cond_kwargs={"text_embeds": text["pooled"].to(self.dtype), "time_ids": sizes.float()},
        ).sample

    def live_pipeline(self, task: str = "text") -> Any:
        import diffusers

        scheduler = getattr(diffusers, self.scheduler_config["_class_name"]).from_config(self.scheduler_config)
        pipeline = getattr(diffusers, self.pipelines[task])(
            **self.components,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty,
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def stock_pipeline(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return folders.load_pipeline(StableDiffusionXLPipeline, self.path, self.components, add_watermarker=False)

    def metadata(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }

    def fingerprint(self, component: str) -> str:
        if component not in self.text_encoders:
            return folders.fingerprint(self.path / component)
        own = folders.fingerprint(self.path / component, self.path / component.replace("text_encoder", "tokenizer"))
        return f"{own}-zeros" if self.zeros_for_empty else own

    def recognises(self, keys: Iterable[str]) -> bool:
        return recognises(keys)


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    starts = (*Names.lora_prefixes.values(), "unet.", "text_encoder.", "text_encoder_2.")
    return all(key.startswith(starts) for key in keys) and sgm.is_xl(keys)


@functools.cache
def tiny() -> StableDiffusionXL:
    """A random instance that runs in milliseconds, with the published model's blocks; VAE factor 4, 16 tokens."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sdxl-"))
    tokenizer = clip.tiny_tokenizer(folder / "first")
    tokenizer_2 = clip.tiny_tokenizer(folder / "second", pad="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            norm_num_groups=8,
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            cross_attention_dim=24 + 32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
        )
        autoencoder = vae.tiny()
        text_encoder = CLIPTextModel(clip.tiny_config(tokenizer))
        text_encoder_2 = CLIPTextModelWithProjection(clip.tiny_config(tokenizer_2, width=32, projection_dim=20))
    StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=backbone,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
