"""Z-Image: a rectified flow by one stream of picture and text, told its captions by Qwen3 (Z-Image Team 2025,
arXiv:2511.22699).

Its backbone counts time from noise to picture and predicts the picture less the noise: both are turned round here.
Every number is read from the model's own configuration but for the length of captions, which is the stock pipeline's.
"""

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.types import Text
from lorakit.families import base, qwen, source, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("ZImagePipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": base.SCHEDULER,
}
TOKENS = 512  # of a caption and what it is wrapped in: max_sequence_length of the stock pipeline
PATCH = 2  # the one patch that the stock pipeline draws with
# Lumina 2 has blocks of the same names, with `attn` and `feed_forward.linear_1` in them
_BLOCK = r"(layers|(noise|context)_refiner)[._]\d+[._](attention[._](to|norm)_|adaLN_modulation|feed_forward[._]w\d)"
_OUTSIDE = r"all_(x_embedder|final_layer)|(t|cap)_embedder"
_KEY = re.compile(rf"(transformer\.|diffusion_model\.|lora_unet_)({_BLOCK}|{_OUTSIDE})")


class Settings(source.Settings):
    family: Literal["zimage"] = "zimage"
    """Z-Image and Z-Image-Turbo."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    model = source.described(settings, PARTS, PIPELINES)
    config = model.config("vae")
    return transformer.describe(
        model,
        ZImage,
        factor=vae.factor(model.folder),
        channels=config["latent_channels"],
        patch=PATCH,
        resolution=config["sample_size"],
        token_limit=TOKENS,
        count_tokens=functools.partial(qwen.count_tokens, *_wrapped(model.folder)),
        text_size=TOKENS * model.config("text_encoder")["hidden_size"] + 1,
    )


def _wrapped(folder: Path) -> tuple[Any, Any]:
    """The tokenizer, and what it puts around a caption."""
    tokenizer = qwen.load_tokenizer(folder / "tokenizer")
    return tokenizer, functools.partial(qwen.as_message, tokenizer, thinking=True)


def load(settings: Settings) -> "ZImage":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    model = source.opened(settings, PARTS, PIPELINES)
    return ZImage(model)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import ZImageTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), ZImageTransformer2DModel) else None


class Names(base.Names):
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "zimage"
    backbone = "transformer"
    # text encoders: no loader takes adapters of Qwen
    lora_prefixes = {"transformer": "lora_unet_"}


class ZImage(Names, base.Frozen):
    """The family `zimage`; see `protocol.Family`."""

    default_targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")}
    default_format = "diffusers"
    stock_formats = ("diffusers", "kohya")
    pipelines = {
        "text": "ZImagePipeline",
        "image": "ZImageImg2ImgPipeline",
        "inpaint": "ZImageInpaintPipeline",
    }

    def __init__(self, model: source.Source) -> None:
        from diffusers import ZImageTransformer2DModel
        from transformers import Qwen3Model

        kinds = {"transformer": ZImageTransformer2DModel, "text_encoder": Qwen3Model}
        super().__init__(model, model.components(**kinds), patch=PATCH)
        self.transformer, self.text_encoder = (self.components[name] for name in kinds)
        self.tokenizer, self._wrap = _wrapped(model.folder)
        self.process = transformer.process(model)
        self.token_limit = TOKENS

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """{"states": (B, L, D), "lengths": (B,)}: the last but one states of Qwen3 of each caption's own tokens."""
        qwen.refuse_weights("Z-Image", weighted=weighted)
        tokens = self.tokenizer(
            [self._wrap(caption) for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        present = tokens.attention_mask.bool()
        output = self.text_encoder(input_ids=tokens.input_ids, attention_mask=present, output_hidden_states=True)
        last = output.hidden_states[-2]
        return qwen.padded([states[own] for states, own in zip(last, present, strict=True)])

    def predict(self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None) -> Tensor:
        states = text["states"].to(self.dtype)
        pictures = self.transformer(
            list(x_t.to(self.dtype).unsqueeze(2)),  # (C, 1, h, w): a film of one picture
            1 - t,
            [of_caption[:length] for of_caption, length in zip(states, text["lengths"].tolist(), strict=True)],
        ).sample
        return -torch.stack(pictures).squeeze(2)

    def live_pipeline(self, task: str = "text") -> Any:
        return base.pipeline(self, task, tokenizer=self.tokenizer)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline counts guidance from 0: its 0 is our 1, none, and so on."""
        return {"guidance_scale": max(scale - 1, 0.0), "negative_prompt": negative_prompt or None}

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "zimage", "modelspec.architecture": "z-image/lora"}


def recognises(keys: Iterable[str]) -> bool:
    """Whether an adapter file with these keys was made for this family."""
    keys = list(keys)
    return bool(keys) and all(_KEY.match(key) for key in keys)


@functools.cache
def tiny() -> ZImage:
    """A random instance that runs in milliseconds; VAE factor 4."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    folder = Path(tempfile.mkdtemp(prefix="lorakit-tiny-zimage-"))
    tokenizer = qwen.tiny_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = ZImageTransformer2DModel(
            in_channels=8,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        for pad in (backbone.x_pad_token, backbone.cap_pad_token):
            nn.init.normal_(pad)
        ZImagePipeline(
            transformer=backbone,
            vae=vae.tiny(latent_channels=8, shift_factor=0.1),
            text_encoder=Qwen3Model(qwen.tiny_config(tokenizer)),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)
    return load(Settings(path=str(folder)))
