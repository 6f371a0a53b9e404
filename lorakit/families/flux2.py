"""FLUX.2 klein: a rectified flow by a transformer on picture and text, told its captions by Qwen3 (Black Forest Labs
2026; the code is their only paper).

Its latents are the VAE's in patches of 2 × 2, each normalised as the VAE's batch norm has counted. Every number is read
from the model's own configuration but for the length of captions and the states that are taken of them, which are the
stock pipeline's. Not here: FLUX.2 dev, whose captions are read by Mistral.
"""

import functools
import inspect
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
from lorakit.families import base, bfl, packing, qwen, source, transformer, vae
from lorakit.families.protocol import Description

_DEV = "Flux2Pipeline"
PIPELINES = ("Flux2KleinPipeline", _DEV)  # which is refused, with a better reason than that nothing reads it
_INDEX = "model_index.json"
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
TOKENS = 512  # of a caption and what it is wrapped in: max_sequence_length of the stock pipeline
_LATENTS = 128  # along a side, at the size the stock pipeline draws where none is said: no configuration says it
_KEY = re.compile(r"transformer\.|lora_unet_|diffusion_model\.")
_SMALL = 5  # blocks of two streams in the model of 4 billion weights; in that of 9 billion there are more


class Settings(source.Settings):
    family: Literal["flux2"] = "flux2"
    """FLUX.2 klein. Train a base model: the distilled ones draw with its adapters, and unlearn to draw in few steps
    when they are trained themselves."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = _klein(source.described(settings, PARTS, PIPELINES))
    factor, config = vae.factor(model.folder), model.config("transformer")
    return transformer.describe(
        model,
        Flux2,
        factor=factor * packing.PATCH,
        channels=config["in_channels"],
        patch=1,
        resolution=factor * _LATENTS,
        token_limit=TOKENS,
        count_tokens=functools.partial(qwen.count_tokens, *_wrapped(model.folder)),
        text_size=TOKENS * config["joint_attention_dim"],
    )


def _klein(model: source.Source) -> source.Source:
    if model.config("", _INDEX)["_class_name"] == _DEV:
        raise InputError(
            f"model.path = {printable(model.folder)} is FLUX.2 dev, whose text encoder (Mistral) is not known here: "
            "give FLUX.2 klein."
        )
    return model


def _wrapped(folder: Path) -> tuple[Any, Any]:
    """The tokenizer, and what it puts around a caption."""
    tokenizer = qwen.load_tokenizer(folder / "tokenizer")
    return tokenizer, functools.partial(qwen.as_message, tokenizer, thinking=False)


def load(settings: Settings) -> "Flux2":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    return Flux2(_klein(source.opened(settings, PARTS, PIPELINES)))


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import Flux2Transformer2DModel

    return Names(components) if isinstance(components.get("transformer"), Flux2Transformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "flux2"
    backbone = "transformer"
    # text encoders: no loader takes adapters of Qwen
    lora_prefixes = {"transformer": "lora_unet_"}

    def original_name(self, component: str, path: str) -> str:
        return bfl.published_name(path)

    @functools.cached_property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        return bfl.fused(self.components["transformer"], "transformer")


class Flux2(Names, base.Frozen):
    """The family `flux2`; see `protocol.Family`."""

    # every linear layer of the blocks, as musubi-tuner and DiffSynth-Studio have it
    default_targets = {"transformer": (*transformer.TARGETS, *bfl.TARGETS_2)}
    default_format = "kohya"
    stock_formats = ("diffusers", "kohya")
    unread = {"kohya": bfl.UNREAD_2}
    # not Flux2KleinInpaintPipeline: it makes what is over a megapixel smaller, whatever size it is asked for
    pipelines = {"text": "Flux2KleinPipeline"}

    def __init__(self, model: source.Source) -> None:
        from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
        from transformers import Qwen3Model

        kinds = {"transformer": Flux2Transformer2DModel, "text_encoder": Qwen3Model}
        super().__init__(model, model.components(**kinds, vae=AutoencoderKLFlux2), patch=packing.PATCH)
        self.transformer, self.text_encoder = (self.components[name] for name in kinds)
        self.tokenizer, self._wrap = _wrapped(model.folder)
        asked = inspect.signature(Flux2KleinPipeline.encode_prompt).parameters
        self.layers: Sequence[int] = asked["text_encoder_out_layers"].default
        self.distilled = bool(model.config("", _INDEX).get("is_distilled"))
        self.process = transformer.process(model, patch=1)
        self.token_limit = TOKENS

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mode in patches, normalised: (B, 4 C, H/2f, W/2f).

        (z - mean) / √(variance + ε), of each place in a patch as the VAE's batch norm has counted.
        """
        z = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        patches = packing.pack(z).mT.unflatten(2, [side // packing.PATCH for side in z.shape[-2:]])
        mean, variance = (x.view(1, -1, 1, 1) for x in (self.vae.bn.running_mean, self.vae.bn.running_var))
        return (patches - mean) / (variance + self.vae.config.batch_norm_eps).sqrt()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self.transformer.config.in_channels, height // self.side_multiple, width // self.side_multiple

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, 3 D)}: states of Qwen3 after some of its layers, side by side; its padding counts."""
        qwen.refuse_weights("FLUX.2", weighted=weighted)
        tokens = self.tokenizer(
            [self._wrap(caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        # the mask is for Qwen alone: the transformer sees the padding, as in the stock pipeline
        output = self.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return {"states": torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        states = text["states"].to(self.dtype)
        tokens = self.transformer(
            x_t.to(self.dtype).flatten(2).mT,
            encoder_hidden_states=states,
            timestep=t,
            img_ids=_places(x_t, 1, *x_t.shape[-2:], 1),
            txt_ids=_places(x_t, 1, 1, 1, states.shape[1]),
        ).sample
        return tokens.mT.unflatten(2, x_t.shape[-2:])

    def live_pipeline(self, task: str = "text") -> Any:
        return base.pipeline(self, task, tokenizer=self.tokenizer, is_distilled=self.distilled)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline takes the states of a negative prompt; a distilled model is led away from nothing."""
        if not negative_prompt:
            return {"guidance_scale": scale}
        if self.distilled:
            raise InputError(
                "sample.negative_prompt: this model is distilled and draws without guidance: leave it out, or draw "
                "with the base model."
            )
        return {"guidance_scale": scale, "negative_prompt_embeds": self.encode_text([negative_prompt])["states"]}

    def metadata(self) -> dict[str, str]:
        size = "4b" if self.components["transformer"].config.num_layers <= _SMALL else "9b"
        return {"ss_base_model_version": "flux2", "modelspec.architecture": f"Flux.2-klein-{size}/lora"}


def _places(like: Tensor, *sides: int) -> Tensor:
    """All places (B, N, 4) in a box of these sides: time, row, column, and word."""
    place = torch.cartesian_prod(*(torch.arange(side, device=like.device) for side in sides))
    return place.expand(len(like), -1, -1)


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys may be for this family; published names may be Chroma's too."""
    keys = list(keys)
    return bfl.has_blocks(keys, generation=2) and all(_KEY.match(key) for key in keys)


def fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the sizes of an adapter that is recognised may be of this family."""
    return bfl.generation(tensors) != 1


@functools.cache
def tiny() -> Flux2:
    """A random base model that runs in milliseconds, with blocks of each kind; VAE factor 4."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-flux2-"))
    tokenizer = qwen.tiny_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = vae.tiny(AutoencoderKLFlux2, latent_channels=4)
        small.bn.running_mean.normal_()
        small.bn.running_var.uniform_(0.5, 2)
        Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=48,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
            ),
            vae=small,
            text_encoder=Qwen3ForCausalLM(qwen.tiny_config(tokenizer, layers=28)),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
