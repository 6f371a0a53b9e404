"""Chroma: FLUX.1 schnell with its modulation made from the time alone by a small network, told its captions by T5 and
guided by a negative prompt (https://huggingface.co/lodestones/Chroma1-HD).

Which tokens are the caption's is told too, though not as a mask: see `Settings.true_mask`. Every number is read from
the model's own configuration.
"""

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core.types import Text
from lorakit.families import base, bfl, clip, packing, source, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("ChromaPipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
_LATENTS = 128  # along a side, at the size the stock pipeline draws where none is said: no configuration says it
# blocks as FLUX's, without the layers of modulation and without CLIP
_MODULATION = r"norm(1|1_context)?\.linear|_mod[._]|[._]modulation[._]|time_text_embed"
_KEY = re.compile(rf"(lora_unet_|(transformer|diffusion_model)\.)(?!.*({_MODULATION}))")


class Settings(source.Settings):
    family: Literal["chroma"] = "chroma"
    """Chroma, and what is built like it."""
    max_sequence_length: int = Field(512, ge=1, le=512)
    """How many tokens of a caption T5 reads."""
    true_mask: bool = False
    """Hide the padding behind a caption, but for its first token, from the transformer, as Chroma was trained. Left
    out: as diffusers draws, which means to and does not (it adds 1 to the attention logits of visible tokens)."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = source.described(settings, PARTS, PIPELINES)
    factor, limit = vae.factor(model.folder), settings.max_sequence_length
    return transformer.describe(
        model,
        Chroma,
        factor=factor,
        channels=model.config("vae")["latent_channels"],
        patch=packing.PATCH,
        resolution=factor * _LATENTS,
        token_limit=limit,
        count_tokens=functools.partial(clip.count_tokens, t5.load_tokenizer(model.folder / "tokenizer")),
        text_size=limit * (model.config("text_encoder")["d_model"] + 1),
    )


def load(settings: Settings) -> "Chroma":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return Chroma(model, max_sequence_length=settings.max_sequence_length, true_mask=settings.true_mask)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import ChromaTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), ChromaTransformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "chroma"
    backbone = "transformer"
    # text encoders: no loader takes adapters of T5
    lora_prefixes: Mapping[str, str] = {"transformer": "lora_unet_"}

    def original_name(self, component: str, path: str) -> str:
        return bfl.published_name(path)

    @functools.cached_property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        return bfl.fused(self.components["transformer"], "transformer")


class Chroma(Names, base.Frozen):
    """The family `chroma`; see `protocol.Family`."""

    default_targets = {"transformer": (*transformer.TARGETS, *bfl.TARGETS)}  # every linear layer of the blocks
    # not ChromaInpaintPipeline: it asks for a setting that this transformer does not have, and draws nothing
    pipelines = {"text": "ChromaPipeline", "image": "ChromaImg2ImgPipeline"}

    def __init__(self, model: source.Source, *, max_sequence_length: int, true_mask: bool) -> None:
        from diffusers import ChromaTransformer2DModel
        from transformers import T5EncoderModel

        kinds = {"transformer": ChromaTransformer2DModel, "text_encoder": T5EncoderModel}
        super().__init__(model, model.components(**kinds), patch=packing.PATCH)
        self.transformer, self.text_encoder = (self.components[name] for name in kinds)
        self.tokenizer = t5.load_tokenizer(model.folder / "tokenizer")
        self.process = transformer.process(model)
        self.true_mask = true_mask
        self.stock_formats = bfl.stock_formats(self.transformer)
        self.default_format = self.stock_formats[-1]
        self.token_limit = max_sequence_length
        self.reading = {"text_encoder": max_sequence_length}

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), T5's last, without a view of the padding, "visible": (B, L), 1 for the caption's tokens
        and the first of the padding, 0 for the others}."""
        limit = self.token_limit
        states, present = t5.encode(
            self.tokenizer, self.text_encoder, captions, limit=limit, masked=True, weighted=weighted
        )
        lengths = present.sum(dim=1, keepdim=True)
        return {"states": states, "visible": (torch.arange(limit, device=lengths.device) <= lengths).float()}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        picture = packing.pack(x_t.to(self.dtype))
        visible = torch.cat([text["visible"], text["visible"].new_ones(picture.shape[:2])], dim=1)
        mask = visible.bool() if self.true_mask else visible.to(self.dtype)
        with _masked_when_checkpointed(self.transformer, mask):
            tokens = self.transformer(
                picture,
                encoder_hidden_states=text["states"].to(self.dtype),
                timestep=t,
                img_ids=packing.places(x_t),
                txt_ids=torch.zeros(text["states"].shape[1], 3, device=x_t.device),
                attention_mask=mask,
            ).sample
        return packing.unpack(tokens, *x_t.shape[-2:])

    def live_pipeline(self, task: str = "text") -> Any:
        pipeline = base.pipeline(self, task, tokenizer=self.tokenizer)
        if self.true_mask:
            prepare = pipeline._prepare_attention_mask

            def prepare_truly(**given: Any) -> Tensor | None:
                mask: Tensor | None = prepare(**given)
                return None if mask is None else mask.bool()  # None: of no negative prompt

            pipeline._prepare_attention_mask = prepare_truly
        return t5.with_limit(pipeline, self.token_limit)

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "flux1", "modelspec.architecture": "chroma/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family; one of attention alone may be for FLUX too."""
    keys = list(keys)
    return bfl.has_blocks(keys) and all(_KEY.match(key) for key in keys)


@contextlib.contextmanager
def _masked_when_checkpointed(transformer: Any, mask: Tensor) -> Iterator[None]:
    """Within it, checkpointed blocks of a single stream get the mask too, which diffusers 0.42 forgets to hand them."""
    checkpoint: Callable[..., Any] | None = getattr(transformer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        yield
        return
    blocks = {*transformer.single_transformer_blocks}

    def with_mask(block: Any, *args: Any) -> Any:
        forgotten = block in blocks and len(args) == 3  # states, time and places
        return checkpoint(functools.partial(block, attention_mask=mask) if forgotten else block, *args)

    transformer._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint


def fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the sizes of an adapter that is recognised may be of this family."""
    return bfl.generation(tensors) != 2


@functools.cache
def tiny() -> Chroma:
    """A random instance that runs in milliseconds, with two blocks of each kind; VAE factor 4."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-chroma-"))
    tokenizer = t5.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ChromaPipeline(
            transformer=ChromaTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(2, 2, 4),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            vae=vae.tiny(shift_factor=0.1),
            text_encoder=t5.tiny(tokenizer, width=32),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
