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
from torch import Tensor

from lorakit.core.types import Task, Text
from lorakit.families import base, clip, emphasis, sgm, source, unet, vae
from lorakit.families.protocol import Description

TASKS: Mapping[Task, Mapping[str, str]] = {
    "text": {
        "text": "StableDiffusionXLPipeline",
        "image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    "inpaint": {"inpaint": "StableDiffusionXLInpaintPipeline"},
    "edit": {"edit": "StableDiffusionXLInstructPix2PixPipeline"},
}
PIPELINES = tuple(pipelines[task] for task, pipelines in TASKS.items())
TOKENIZERS = ("tokenizer", "tokenizer_2")
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    **dict.fromkeys(TOKENIZERS, "tokenizer_config.json"),
    "scheduler": base.SCHEDULER,
}


class Settings(unet.Settings):
    family: Literal["sdxl"] = "sdxl"
    """Stable Diffusion XL and what is built like it."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizers."""
    model = source.described(settings, PARTS, PIPELINES)
    return unet.describe(
        model,
        StableDiffusionXL,
        chunks=settings.caption_chunks,
        pooled=model.config("text_encoder_2")["projection_dim"],
    )


def load(settings: Settings) -> "StableDiffusionXL":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return StableDiffusionXL(model, chunks=settings.caption_chunks)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    unet, second = components.get("unet"), components.get("text_encoder_2")
    two_encoders = isinstance(second, CLIPTextModelWithProjection | None) and "text_encoder_2" in components
    return Names(components) if isinstance(unet, UNet2DConditionModel) and two_encoders else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "sdxl"
    backbone = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    lora_prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

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


class StableDiffusionXL(Names, unet.Model):
    """The family `sdxl`; see `protocol.Family`."""

    default_targets = {
        "unet": unet.TARGETS,
        "text_encoder": clip.TARGETS,
        "text_encoder_2": clip.TARGETS,
    }
    stock_options = {"add_watermarker": False}
    default_format = "kohya"
    stock_formats = ("diffusers", "kohya")
    tasks = TASKS

    def __init__(self, model: source.Source, *, chunks: int) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        super().__init__(model, model.components(unet=UNet2DConditionModel, **encoders))
        self.text_encoder, self.text_encoder_2 = (self.components[name] for name in encoders)
        self.tokenizer, self.tokenizer_2 = (clip.load_tokenizer(model.folder / part) for part in TOKENIZERS)
        # the stock pipeline's default, where the folder does not say
        self.zeros_for_empty = model.config("", "model_index.json").get("force_zeros_for_empty_prompt", True)
        self.chunks, self.token_limit = chunks, clip.long_limit(self.tokenizer, chunks)

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D + D₂), "pooled": (B, P)}; captions are cut at L tokens.

        States are the encoders' last but one side by side, without a final norm; pooled is the second's projection. An
        empty caption is zeros where the stock pipeline takes zeros for no negative prompt: what guidance leads away
        from is then what dropped captions have trained.
        """
        states = []
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            ids, _, weights = clip.tokens(tokenizer, captions, weighted=weighted, chunks=self.chunks)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            last = clip.joined(output.hidden_states[-2], self.chunks)
            if weights is not None:
                last = emphasis.weigh(last, clip.joined(weights.to(last.device), self.chunks))
            states.append(last)
        text = {"states": torch.cat(states, dim=-1), "pooled": output.text_embeds[:: self.chunks]}
        if not self.zeros_for_empty:
            return text
        said = torch.tensor([caption != "" for caption in captions], device=self.text_encoder.device)
        return {name: x.where(said.view(-1, *[1] * (x.ndim - 1)), torch.zeros_like(x)) for name, x in text.items()}

    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None, beside: Tensor | None = None
    ) -> Tensor:
        if sizes is None:
            height, width = (side * self.factor for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), 6)
        return self.unet(
            self.sample(x_t, beside),
            t,
            encoder_hidden_states=text["states"].to(self.dtype),
            added_cond_kwargs={"text_embeds": text["pooled"].to(self.dtype), "time_ids": sizes.float()},
        ).sample

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(
            self,
            task,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            force_zeros_for_empty_prompt=self.zeros_for_empty,
            add_watermarker=False,
        )
        return unet.with_chunks(pipeline, self) if self.chunks > 1 else pipeline

    def metadata(self) -> dict[str, str]:
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        }

    def fingerprint(self, component: str) -> str:
        own = super().fingerprint(component)
        if component not in self.text_encoders:
            return own
        marks = (["zeros"] if self.zeros_for_empty else []) + ([str(self.chunks)] if self.chunks > 1 else [])
        return "-".join([own, *marks])


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    starts = (*Names.lora_prefixes.values(), "unet.", "text_encoder.", "text_encoder_2.")
    return all(key.startswith(starts) for key in keys) and sgm.is_xl(keys)


@functools.cache
def tiny(task: Task = "text") -> StableDiffusionXL:
    """A random instance that runs in milliseconds, with the published model's blocks; VAE factor 4, 16 tokens."""
    import diffusers
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-sdxl-"))
    tokenizer = clip.tiny_tokenizer(folder / "first")
    tokenizer_2 = clip.tiny_tokenizer(folder / "second", pad="!")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = UNet2DConditionModel(
            sample_size=8,
            in_channels=unet.channels(task, 4),
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
    getattr(diffusers, TASKS[task][task])(
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
