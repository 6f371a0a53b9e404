"""Names of FLUX's layers in Black Forest Labs' own layout, which kohya's files for FLUX, Chroma and FLUX.2 use.

Queries, keys and values are one layer there, and in FLUX.1's blocks of a single stream what comes before the
feed-forward too; in FLUX.2's these are one layer here as well. Its blocks share their modulation.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

# the linear layers of its blocks beside attention, whose names here are other models' too
TARGETS = (
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "single_transformer_blocks.*.proj_out",
)
MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
TARGETS_2 = ("linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")  # the same of FLUX.2's blocks
# layers of FLUX.2 that diffusers leaves out when it reads kohya's files
UNREAD_2 = ("_stream_modulation", "norm_out.", "guidance_embedder.")
WIDTH = 3072  # that of the published models, which diffusers' reader of kohya's files has built in

_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in",
    "time_guidance_embed.timestep_embedder": "time_in",
    "time_guidance_embed.guidance_embedder": "guidance_in",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_INSIDE = {
    "linear_1": "in_layer",
    "linear_2": "out_layer",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1.linear": "img_mod.lin",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")
# what one generation's adapters have and the other's have not
_OWN = {
    1: re.compile(
        r"proj_mlp|\.net\.|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_out)\b|\bnorm(1|1_context)?\.linear"
        r"|_mod[._]lin|\d[._]modulation[._]lin|time_text_embed|distilled_guidance|(lora_te|text_encoder)"
    ),
    2: re.compile(r"to_qkv_mlp_proj|\.linear_(in|out)|attn\.to_out\.lora|_stream_modulation|time_guidance_embed"),
}
# layers whose numbers out for one in are the generation's: attention and feed-forward, and feed-forward alone
_WIDENING = re.compile(r"(linear1|mlp[._]0)\.lora_(down|A)\.weight$")
_WIDER = {7: 1, 4: 1, 9: 2, 6: 2}
_BLOCKS = re.compile(r"single_transformer_blocks\.|(single|double)_blocks[._]")


def published_name(path: str) -> str:
    """The name there of the module `path` of a transformer; what is not in the tables keeps its own.

    Among that is `norm_out.linear`, whose halves are exchanged there: no program trains it.
    """
    block = _BLOCK.match(path)
    if block:
        rest = path[block.end() :]
        return f"{'single' if block[1] else 'double'}_blocks.{block[2]}.{_INSIDE[rest]}" if rest in _INSIDE else path
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    outer, _, inner = path.rpartition(".")
    outer = outer if outer.startswith("distilled_guidance_layer.layers.") else _OUTSIDE.get(outer, "")
    return f"{outer}.{_INSIDE[inner]}" if outer and inner in _INSIDE else path


def fused(transformer: Any, component: str) -> dict[str, tuple[str, ...]]:
    """The layers there that are several here; see `protocol.Names.fused`."""
    found = {}
    single = transformer.single_transformer_blocks
    together = bool(single) and hasattr(single[0].attn, "to_qkv_mlp_proj")
    for there, here, count, groups in (
        ("double_blocks", "transformer_blocks", transformer.config.num_layers, _DOUBLE),
        ("single_blocks", "single_transformer_blocks", len(single), {} if together else _SINGLE),
    ):
        for i in range(count):
            for whole, parts in groups.items():
                found[f"{component}.{there}.{i}.{whole}"] = tuple(f"{component}.{here}.{i}.{part}" for part in parts)
    return found


def has_blocks(keys: Iterable[str], *, generation: int = 1) -> bool:
    """Whether some key is of a block as only these models have them, and none of a layer of another generation's.

    In the published layout the blocks of FLUX.2 and Chroma have the same names: see `generation`.
    """
    keys = list(keys)
    return any(map(_BLOCKS.search, keys)) and not any(map(_OWN[3 - generation].search, keys))


def generation(tensors: Mapping[str, Tensor]) -> int | None:
    """1 or 2 by the sizes of an adapter in the published layout: the feed-forward of FLUX.2 is gated. None: either."""
    for key, first in tensors.items():
        second = tensors.get(key.replace(".lora_down.", ".lora_up.").replace(".lora_A.", ".lora_B."))
        if _WIDENING.search(key) and second is not None and first.ndim == second.ndim == 2 and first.numel():
            return _WIDER.get(second.shape[0] // first.shape[1])
    return None


def stock_formats(transformer: Any) -> tuple[str, ...]:
    """Those of `protocol.Family.stock_formats`, last the one that most programs read, each at its stored strength.

    That is kohya's; for models of other widths diffusers cannot split it.
    """
    config = transformer.config
    published = config.num_attention_heads * config.attention_head_dim == WIDTH
    return ("diffusers", "kohya") if published else ("diffusers",)
