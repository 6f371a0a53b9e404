"""What families share whose backbone is a diffusers U-Net on a VAE's latents, told a caption by CLIP.

A U-Net may see more than x_t: the first layer's channels say what the model was made for.
"""

import functools
from collections.abc import Mapping
from typing import Any, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Task
from lorakit.diffusion import GaussianDiffusion
from lorakit.families import base, clip, folders, source, vae
from lorakit.families.protocol import Description
from lorakit.families.source import Source

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


class Settings(source.Settings):
    """Base of the settings of these families."""

    caption_chunks: int = Field(1, ge=1, le=8)
    """How many times CLIP's 75 tokens a caption may have. Each chunk is read by itself and their states stand in a
    row, as in A1111 and ComfyUI; the stock pipeline cuts captions at the first."""


class Model(base.Frozen):
    """A frozen U-Net with its encoders; `tasks` are the stock pipelines' classes by what the model was made for."""

    tasks: Mapping[Task, Mapping[str, str]]

    def __init__(self, model: Source, components: Mapping[str, Any]) -> None:
        super().__init__(model, components)
        self.unet = self.components["unet"]
        self.task = task(model)
        self.pipelines = self.tasks[self.task]
        self.process = process(model)
        self.drawing_multiple = vae.drawing_multiple(self.factor)

    def encode_given(self, given: Mapping[str, Tensor]) -> Tensor:
        """For inpainting the mask at the latents' size, and latents of the picture that is grey where it is 1; for
        editing the picture's posterior mode, not scaled (Brooks et al. 2023, arXiv:2211.09800), zeros where dropped."""
        if self.task == "edit":
            z = given["latents"] if "latents" in given else vae.posterior_mean(self.vae, given["pixels"])
            return z if "dropped" not in given else z * (1 - given["dropped"].view(-1, 1, 1, 1))
        latents = self.encode_images(given["pixels"] * (given["mask"] < 0.5))
        # the nearest pixel's value, as the stock pipeline takes it
        return torch.cat([F.interpolate(given["mask"], size=latents.shape[-2:]).to(latents), latents], dim=1)

    def sample(self, x_t: Tensor, beside: Tensor | None) -> Tensor:
        """What the U-Net is handed: x_t and behind it, where it takes more, `beside`; where that is None, what it is
        where nothing is shown: no picture, or one of which all is to be painted."""
        if self.task == "text":
            return x_t.to(self.dtype)
        if beside is None and self.task == "edit":
            beside = torch.zeros_like(x_t)
        if beside is None:
            mask = x_t.new_ones(len(x_t), 1, *(side * self.factor for side in x_t.shape[-2:]))
            beside = self.encode_given({"pixels": torch.zeros_like(mask).expand(-1, 3, -1, -1), "mask": mask})
        return torch.cat([x_t, beside.to(x_t)], dim=1).to(self.dtype)


def task(model: Source) -> Task:
    """What the `model` was made for. Raises InputError where its U-Net sees something else than is known here."""
    sees, own = model.config("unet")["in_channels"], model.config("vae")["latent_channels"]
    known = {channels(task, own): task for task in get_args(Task)}
    if sees not in known:
        raise InputError(
            f"model.path = {printable(model.folder)}: its U-Net sees {sees} channels, and here are known "
            f"{', '.join(f'{number} ({task})' for number, task in known.items())}: take another model."
        )
    if model.config("", "model_index.json").get("is_cosxl_edit"):
        raise InputError(
            f"model.path = {printable(model.folder)}: its pipeline scales the picture that it edits (is_cosxl_edit), "
            "which is not known here: take another model."
        )
    return known[sees]


def channels(task: Task, own: int) -> int:
    """How many channels the U-Net of a model for `task` sees, of latents that have `own`."""
    return {"text": own, "inpaint": own + 1 + own, "edit": own + own}[task]


def process(model: Source) -> GaussianDiffusion:
    return GaussianDiffusion.from_scheduler_config(model.config("scheduler", base.SCHEDULER))


def describe(model: Source, family: type[Any], *, chunks: int, pooled: int = 0) -> Description:
    """The description of the `model`, whose captions are a state for each token of its chunks and `pooled` numbers."""
    factor = vae.factor(model.folder)
    channels = model.config("vae")["latent_channels"]
    tokenizer = clip.load_tokenizer(model.folder / "tokenizer")
    width = sum(model.config(part)["hidden_size"] for part in family.text_encoders)
    return Description(
        side_multiple=factor,
        drawing_multiple=vae.drawing_multiple(factor),
        resolution=factor * model.config("unet")["sample_size"],
        token_limit=clip.long_limit(tokenizer, chunks),
        process=process(model),
        count_tokens=functools.partial(clip.count_tokens, tokenizer),
        backbone=family.backbone,
        default_targets=family.default_targets,
        lora_prefixes=family.lora_prefixes,
        weight_shapes=lambda component: folders.weight_shapes(model.folder / component),
        latent_size=lambda width, height: channels * (width // factor) * (height // factor),
        text_size=chunks * tokenizer.model_max_length * width + pooled,
        task=task(model),
    )


def with_chunks(pipeline: Any, family: Any) -> Any:
    """`pipeline`, which now reads prompts as `family` reads captions."""

    def encode_prompt(
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        away = negative_prompt or ""
        said = family.encode_text(prompts)
        unsaid = family.encode_text([away] * len(prompts) if isinstance(away, str) else away)
        return tuple(
            text[name].to(family.dtype).repeat_interleave(num_images_per_prompt, dim=0)
            for name in said
            for text in (said, unsaid)
        )

    def encode_edit(*args: Any, **kwargs: Any) -> Tensor:
        """As Stable Diffusion's editing pipeline has it: at once for its three predictions."""
        said, unsaid = encode_prompt(*args, **kwargs)
        return torch.cat([said, unsaid, unsaid]) if pipeline.do_classifier_free_guidance else said

    pipeline.encode_prompt = encode_prompt
    if family.task == "edit" and hasattr(pipeline, "_encode_prompt"):
        pipeline._encode_prompt = encode_edit
    return pipeline
