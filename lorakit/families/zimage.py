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

from lorakit.core import settings as core_settings
from lorakit.core.quiet import quiet_libraries
from lorakit.core.types import Text
from lorakit.families import folders, qwen, transformer, vae
from lorakit.families.protocol import Description

PIPELINES = ("ZImagePipeline",)
PARTS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": transformer.SCHEDULER,
}
TOKENS = 512  # of a caption and what it is wrapped in: max_sequence_length of the stock pipeline
PATCH = 2  # the one patch that the stock pipeline draws with
# Lumina 2 has blocks of the same names, with `attn` and `feed_forward.linear_1` in them
_BLOCK = r"(layers|(noise|context)_refiner)[._]\d+[._](attention[._]|adaLN_modulation|feed_forward[._]w\d)"
_KEY = re.compile(rf"(transformer\.|lora_unet_)({_BLOCK}|all_(x_embedder|final_layer)|(t|cap)_embedder)")


class Settings(core_settings.Settings):
    family: Literal["zimage"] = "zimage"
    """Z-Image and Z-Image-Turbo."""
    path: str
    """A diffusers folder or a hub name."""


def describe(settings: Settings) -> Description:
    """Side multiple, resolution and token counts, from configurations and the tokenizer."""
    folder = folders.resolve(settings.path, weights=False)
    folders.check(folder, PARTS, pipelines=PIPELINES, weights=Path(settings.path).is_dir())
    config = folders.read_config(folder, "vae")
    return transformer.describe(
        folder,
        ZImage,
        factor=vae.factor(folder),
        channels=config["latent_channels"],
        patch=PATCH,
        resolution=config["sample_size"],
        token_limit=TOKENS,
        count_tokens=functools.partial(qwen.count_tokens, *_wrapped(folder)),
        text_size=TOKENS * folders.read_config(folder, "text_encoder")["hidden_size"] + 1,
    )


def _wrapped(folder: Path) -> tuple[Any, Any]:
    """The tokenizer, and what it puts around a caption."""
    tokenizer = qwen.load_tokenizer(folder / "tokenizer")
    return tokenizer, functools.partial(qwen.as_message, tokenizer, thinking=True)


def load(settings: Settings) -> "ZImage":
    """Raises InputError where the folder is not complete, is of another family, or holds pickles."""
    folder = folders.resolve(settings.path)
    folders.check(folder, PARTS, pipelines=PIPELINES)
    return ZImage(folder)


def around(components: Mapping[str, Any]) -> "Names | None":
    """The names of layers in a stock pipeline with these components; None where they are another family's."""
    from diffusers import ZImageTransformer2DModel

    return Names(components) if isinstance(components.get("transformer"), ZImageTransformer2DModel) else None


class Names:
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    name = "zimage"
    backbone = "transformer"
    text_encoders: tuple[str, ...] = ()  # no loader takes adapters of Qwen
    lora_prefixes = {"transformer": "lora_unet_"}
    fused: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components = {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    def original_name(self, component: str, path: str) -> str:
        return path


class ZImage(Names):
    """The family `zimage`; see `protocol.Family`."""

    default_targets = {"transformer": ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")}
    default_format = "diffusers"
    stock_formats = ("diffusers", "kohya")
    pipelines = {
        "text": "ZImagePipeline",
        "image": "ZImageImg2ImgPipeline",
        "inpaint": "ZImageInpaintPipeline",
    }

    def __init__(self, path: Path) -> None:
        from diffusers import ZImageTransformer2DModel
        from transformers import Qwen3Model

        quiet_libraries()
        self.path = path
        self.dtype = torch.float32
        self.transformer = folders.load_component(ZImageTransformer2DModel, path / "transformer")
        self.vae = vae.load(path)
        self.text_encoder = folders.load_component(Qwen3Model, path / "text_encoder")
        self.tokenizer, self._wrap = _wrapped(path)
        self.process = transformer.process(path)
        super().__init__({name: getattr(self, name) for name in ("transformer", "vae", "text_encoder")})
        self.factor = vae.factor(path)
        self.side_multiple = self.drawing_multiple = self.factor * PATCH
        self.token_limit = TOKENS
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
        return transformer.pipeline(self, task, tokenizer=self.tokenizer)

    def guided(self, scale: float, negative_prompt: str) -> dict[str, Any]:
        """The stock pipeline counts guidance from 0: its 0 is our 1, none, and so on."""
        return {"guidance_scale": max(scale - 1, 0.0), "negative_prompt": negative_prompt or None}

    def stock_pipeline(self) -> Any:
        from diffusers import ZImagePipeline

        return folders.load_pipeline(ZImagePipeline, self.path, self.components)

    def metadata(self) -> dict[str, str]:
        return {"ss_base_model_version": "zimage", "modelspec.architecture": "z-image/lora"}

    def fingerprint(self, component: str) -> str:
        parts = [component, "tokenizer"] if component == "text_encoder" else [component]
        return folders.fingerprint(*(self.path / part for part in parts))

    def recognises(self, keys: Iterable[str]) -> bool:
        return recognises(keys)


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
