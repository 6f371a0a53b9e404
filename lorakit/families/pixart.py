"""PixArt-Σ: Gaussian diffusion by a transformer that reads T5's states through cross-attention (Chen et al.,
arXiv:2403.04692).

The stock pipeline has no loader for adapters: `lorakit.load_adapter` and peft put them in. PixArt-α, whose backbone is
also told the picture's size, is another pipeline and is refused. Every number is read from the model's own
configuration but for the length of captions, which is the stock pipeline's.
"""

import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Text
from lorakit.families import base, clip, source, t5, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("PixArtSigmaPipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
_DRAWN = (32, 64, 128, 256)  # sizes of latents that the stock pipeline knows sides of pictures for
# Sana's attention has the same names; its feed-forward layers are convolutions
_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.to_|ff\.net\.)"
_KEY = re.compile(rf"transformer\.({_BLOCK}|adaln_single\.|caption_projection\.|pos_embed\.proj\.|proj_out\.)")


class Settings(source.Settings):
    family: Literal["pixart"] = "pixart"
    """PixArt-Σ."""
    max_sequence_length: int = Field(300, ge=1, le=300)
    """How many tokens of a caption T5 reads."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = _checked(source.described(settings, PARTS, PIPELINES))
    backbone = model.config("transformer")
    tokenizer = t5.load_tokenizer(model.folder / "tokenizer")
    factor, limit = vae.factor(model.folder), settings.max_sequence_length
    return transformer.describe(
        model,
        PixArt,
        factor=factor,
        channels=backbone["in_channels"],
        patch=backbone["patch_size"],
        resolution=factor * backbone["sample_size"],
        token_limit=limit,
        count_tokens=lambda caption: clip.count_tokens(tokenizer, *cleaned([caption])),
        text_size=limit * (model.config("text_encoder")["d_model"] + 1),
        own_process=transformer.gaussian(model),
    )


def load(settings: Settings) -> "PixArt":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = _checked(source.opened(settings, PARTS, PIPELINES))
    return PixArt(model, max_sequence_length=settings.max_sequence_length)


def _checked(model: source.Source) -> source.Source:
    size = model.config("transformer").get("sample_size")
    if size in _DRAWN:
        return model
    raise InputError(
        f"{printable(model.folder / 'transformer' / 'config.json')}: sample_size = {size}: the stock pipeline draws "
        f"with {', '.join(map(str, _DRAWN))} alone: set that which the model was trained at."
    )


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import PixArtTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), PixArtTransformer2DModel) else None


def cleaned(captions: Sequence[str]) -> list[str]:
    """`captions` as the stock pipeline hands them to the tokenizer: in lower case, without blanks around them.

    Where both bs4 and ftfy are installed it also takes out links, markup, brackets and much else, and so do we.
    """
    if not _cleans():
        return [caption.lower().strip() for caption in captions]
    from diffusers import PixArtSigmaPipeline

    stock = object.__new__(PixArtSigmaPipeline)  # its method reads nothing of a pipeline's
    return list(stock._text_preprocessing(list(captions), clean_caption=True))


def _cleans() -> bool:
    return all(importlib.util.find_spec(name) for name in ("bs4", "ftfy"))


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`.

    There are no names for kohya's layout, and no loader takes adapters of T5.
    """

    name = "pixart"
    backbone = "transformer"


class PixArt(Names, base.Frozen):
    """The family `pixart`; see `protocol.Family`."""

    # every linear layer of the blocks
    default_targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")}
    default_format = "diffusers"
    stock_formats: tuple[str, ...] = ()
    pipelines = {"text": "PixArtSigmaPipeline"}

    def __init__(self, model: source.Source, *, max_sequence_length: int) -> None:
        from diffusers import PixArtTransformer2DModel
        from transformers import T5EncoderModel

        kinds = {"transformer": PixArtTransformer2DModel, "text_encoder": T5EncoderModel}
        super().__init__(model, model.components(**kinds), patch=model.config("transformer")["patch_size"])
        self.transformer, self.text_encoder = (self.components[name] for name in kinds)
        self.tokenizer = t5.load_tokenizer(model.folder / "tokenizer")
        self.process = transformer.gaussian(model)
        self.token_limit = max_sequence_length

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), T5's last, without a view of the padding, "mask": (B, L), 1 for a caption's tokens}."""
        if weighted and _cleans():
            raise InputError(
                "data.weighted_tags: where bs4 and ftfy are installed, the stock pipeline of pixart takes the brackets "
                "out of captions: uninstall one of them, or set it to false."
            )
        states, mask = t5.encode(
            self.tokenizer,
            self.text_encoder,
            cleaned(captions),
            limit=self.token_limit,
            masked=True,
            weighted=weighted,
        )
        return {"states": states, "mask": mask}

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        said = self.transformer(
            x_t.to(self.dtype),
            encoder_hidden_states=text["states"].to(self.dtype),
            encoder_attention_mask=text["mask"],
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return said[:, : x_t.shape[1]]  # behind it, where there is more, the variance

    def live_pipeline(self, task: str = "text") -> Any:
        side = self.factor * self.transformer.config.sample_size
        pipeline = base.drawing_as_asked(base.pipeline(self, task, tokenizer=self.tokenizer), side)
        return t5.with_limit(pipeline, self.token_limit, clean_caption=_cleans())  # asked to and unable, it complains

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline takes no None for a negative prompt."""
        return {"guidance_scale": scale, "negative_prompt": negative_prompt}

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "pixart_sigma", "modelspec.architecture": "pixart-sigma/lora"}

    def fingerprint(self, component: str) -> str:
        own = super().fingerprint(component)
        if component != "text_encoder":
            return own
        return f"{own}-{self.token_limit}" + ("-cleaned" if _cleans() else "")


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys may be for this family; one of attention alone may be for Sana too."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys)


@functools.cache
def tiny() -> PixArt:
    """A random instance that runs in milliseconds, of the smallest size that the stock pipeline draws; VAE factor 4."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-pixart-"))
    tokenizer = t5.tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PixArtSigmaPipeline(
            transformer=PixArtTransformer2DModel(
                sample_size=_DRAWN[0],
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                cross_attention_dim=16,
                caption_channels=32,
            ),
            vae=vae.tiny(),
            text_encoder=t5.tiny(tokenizer, width=32),
            tokenizer=tokenizer,
            scheduler=DPMSolverMultistepScheduler(),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
