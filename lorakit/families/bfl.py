"""Names of FLUX's layers in Black Forest Labs' own layout, which kohya's files for FLUX and Chroma use.

Queries, keys and values are one layer there, and in blocks of a single stream what comes before the feed-forward too.
"""

import re
from collections.abc import Iterable
from typing import Any

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
WIDTH = 3072  # that of the published models, which diffusers' reader of kohya's files has built in

_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in",
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
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.")


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
    for there, here, count, groups in (
        ("double_blocks", "transformer_blocks", transformer.config.num_layers, _DOUBLE),
        ("single_blocks", "single_transformer_blocks", transformer.config.num_single_layers, _SINGLE),
    ):
        for i in range(count):
            for whole, parts in groups.items():
                found[f"{component}.{there}.{i}.{whole}"] = tuple(f"{component}.{here}.{i}.{part}" for part in parts)
    return found


def has_blocks(keys: Iterable[str]) -> bool:
    """Whether some key is of a block as only these models have them."""
    return any(
        "single_transformer_blocks." in key or "single_blocks_" in key or "double_blocks_" in key for key in keys
    )


def stock_formats(transformer: Any) -> tuple[str, ...]:
    """Those of `protocol.Family.stock_formats`, last the one that most programs read, each at its stored strength.

    That is kohya's; for models of other widths diffusers cannot split it.
    """
    config = transformer.config
    published = config.num_attention_heads * config.attention_head_dim == WIDTH
    return ("diffusers", "kohya") if published else ("diffusers",)
