"""Names of U-Net layers in the layout of Stability AI's generative-models, which kohya's files for SDXL use, and single
files of SDXL and, as it was there before, Stable Diffusion 1.x."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# within a residual block; attention has one spelling
_RESIDUAL = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# what only an adapter of SDXL has: a second text encoder, sgm's names, embedded sizes, more than one block of attention
_XL = re.compile(
    r"lora_te2_|text_encoder_2\.|(in|out)put_blocks_|middle_block_|label_emb|add_embedding|"
    r"attentions[._]\d+[._]transformer_blocks[._][1-9]"
)


def blocks(config: Any) -> dict[str, str]:
    """The names of a U-Net's blocks here to those there, for the configuration of a diffusers U-Net.

    sgm numbers the blocks of all levels in one row: input block 0 is the first convolution, then come each level's
    layers and its downsampler; output blocks are each level's layers, the last one with the upsampler in it.
    """
    layers = config.layers_per_block
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_out": "out.2",
    }
    for level, kind in enumerate(config.up_block_types):
        first = level * (layers + 1)
        for layer in range(layers):
            names[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer + 1}.0"
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer + 1}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        for layer in range(layers + 1):
            names[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        behind = 2 if "CrossAttn" in kind else 1  # the upsampler comes behind residual block and attention
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{behind}.conv"
    return names


def published_name(path: str, blocks: Mapping[str, str]) -> str:
    """The name there of the module `path` of a U-Net with these `blocks`; what is in no block keeps its own."""
    for block, name in blocks.items():
        if path == block:
            return name
        if path.startswith(f"{block}."):
            rest = path.removeprefix(f"{block}.")
            return f"{name}.{_RESIDUAL.get(rest, rest) if '.resnets.' in block else rest}"
    return path


def single_file_key(path: str, config: Any) -> tuple[str, int, int]:
    """Where the weight of a U-Net's module is in a single file; see `protocol.SingleFile`."""
    return f"model.diffusion_model.{published_name(path, blocks(config))}.weight", 0, 1


def is_xl(keys: Iterable[str]) -> bool:
    """Whether some key is of an adapter for SDXL and not for an earlier Stable Diffusion."""
    return any(_XL.search(key) for key in keys)
