"""Single files of the tiny Stable Diffusion models, in the layout that such models are passed on in."""

import torch

from lorakit.families import FAMILIES, sgm

VAE = {f"mid_block.{ours}": f"mid.{theirs}" for ours, theirs in (("resnets.0", "block_1"), ("resnets.1", "block_2"))}
VAE |= {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "conv_norm_out": "norm_out"}
VAE |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE |= {f"encoder.down_blocks.{i}.": f"encoder.down.{i}." for i in range(3)}
VAE |= {f"decoder.up_blocks.{i}.": f"decoder.up.{2 - i}." for i in range(3)}
VAE |= {"resnets": "block", "samplers.0": "sample", "conv_shortcut": "nin_shortcut"}
OPEN = {"text_model.encoder.layers": "transformer.resblocks", "text_model.final_layer_norm": "ln_final"}
OPEN |= {"self_attn": "attn", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj", "text_model.embeddings.": ""}
OPEN |= {"position_embedding.weight": "positional_embedding", "text_projection.weight": "text_projection"}


def renamed(name: str, words: dict[str, str]) -> str:
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


def unet_name(name: str, blocks: dict[str, str]) -> str:
    path, _, ending = name.rpartition(".")
    found = sgm.published_name(path, blocks)
    if ".resnets." in path:
        found = found.replace("norm1", "in_layers.0").replace("norm2", "out_layers.0")
    return f"model.diffusion_model.{found.replace('conv_norm_out', 'out.0')}.{ending}"


def single_file(of: str) -> dict[str, torch.Tensor]:
    """The tiny model's weights as they are passed on in one file."""
    parts = FAMILIES.module(of).tiny().components
    blocks = sgm.blocks(parts["unet"].config)
    found = {unet_name(name, blocks): tensor for name, tensor in parts["unet"].state_dict().items()}
    for name, tensor in parts["vae"].state_dict().items():
        attention = "attentions" in name and tensor.ndim == 2  # 1×1 convolutions there
        found[f"first_stage_model.{renamed(name, VAE)}"] = tensor[:, :, None, None] if attention else tensor
    first = "cond_stage_model" if of == "sd" else "conditioner.embedders.0"
    for name, tensor in parts["text_encoder"].state_dict().items():
        found[f"{first}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if of == "sdxl":
        second = {}
        for name, tensor in parts["text_encoder_2"].state_dict().items():
            second[renamed(name, OPEN)] = tensor.T if name.startswith("text_projection") else tensor
        for name in [name for name in second if ".q_proj." in name]:
            rows = [second.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            second[name.replace(".q_proj.", ".in_proj_")] = torch.cat(rows)
        found |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    found["alphas_cumprod"], found["step"] = torch.linspace(1, 0, 7), torch.tensor([3])
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}
