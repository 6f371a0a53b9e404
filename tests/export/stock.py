"""Pipelines that lorakit did not write, around the parts of a tiny family's stock pipeline, and how each is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch

SIDE = 32
Pipeline = Any


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: from a stock text-to-image pipeline of `family` to it, and what it is called with."""

    build: Callable[[Pipeline], Pipeline]
    arguments: dict[str, Any]
    family: str = "sd"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((1, SIDE, SIDE, 3), dtype=np.float32)


def with_unet(pipeline: Pipeline, **changed: Any) -> dict[str, Any]:
    """The components of `pipeline` with another U-Net that has the same adapted layers, weights from a fixed seed."""
    torch.manual_seed(3)
    config = {**pipeline.unet.config, **changed}
    return {**pipeline.components, "unet": diffusers.UNet2DConditionModel.from_config(config).eval()}


def controlnet(pipeline: Pipeline) -> Any:
    torch.manual_seed(4)
    net = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16))
    for block in net.controlnet_down_blocks:  # zero at birth, when they control nothing
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


def t2i_adapter(pipeline: Pipeline) -> Pipeline:
    torch.manual_seed(5)
    net = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter")
    # its features go into blocks with attention before these shrink them
    parts = with_unet(
        pipeline, down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2
    )
    del parts["image_encoder"]
    return diffusers.StableDiffusionAdapterPipeline(**parts, adapter=net.eval())


def t2i_adapter_xl(pipeline: Pipeline) -> Pipeline:
    torch.manual_seed(5)
    kind = "full_adapter_xl"
    net = diffusers.T2IAdapter(channels=[16, 16, 32], num_res_blocks=1, downscale_factor=8, adapter_type=kind)
    return diffusers.StableDiffusionXLAdapterPipeline(**pipeline.components, adapter=net.eval())


def upscaling(pipeline: Pipeline) -> Pipeline:
    parts = with_unet(pipeline, in_channels=7, num_class_embeds=1000)
    del parts["image_encoder"]
    scheduler = diffusers.DDPMScheduler()
    return diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=scheduler, max_noise_level=350)


MASK = np.ones((1, SIDE, SIDE, 1), np.float32)
MASK[:, :, SIDE // 2 :] = 0
CONTROL = torch.from_numpy(picture(1)).movedim(-1, 1)
SIZE = {"width": SIDE, "height": SIDE}
OVER = {"image": picture(0), "strength": 0.9}
PART = {"image": picture(0), "mask_image": MASK, **SIZE}

KINDS = {
    "text to image": Kind(lambda p: p, SIZE),
    "image to image": Kind(diffusers.StableDiffusionImg2ImgPipeline.from_pipe, OVER),
    "inpaint": Kind(diffusers.StableDiffusionInpaintPipeline.from_pipe, PART),
    "inpaint, nine channels": Kind(
        lambda p: diffusers.StableDiffusionInpaintPipeline(**with_unet(p, in_channels=9)), PART
    ),
    "ControlNet": Kind(
        lambda p: diffusers.StableDiffusionControlNetPipeline.from_pipe(p, controlnet=controlnet(p)), {"image": CONTROL}
    ),
    "T2I-adapter": Kind(t2i_adapter, {"image": CONTROL}),
    "upscale": Kind(upscaling, {"image": picture(2)[:, ::2, ::2]}),
    "XL: text to image": Kind(lambda p: p, SIZE, "sdxl"),
    "XL: image to image": Kind(diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe, OVER, "sdxl"),
    "XL: inpaint": Kind(diffusers.StableDiffusionXLInpaintPipeline.from_pipe, PART, "sdxl"),
    "XL: ControlNet": Kind(
        lambda p: diffusers.StableDiffusionXLControlNetPipeline.from_pipe(p, controlnet=controlnet(p)),
        {"image": CONTROL},
        "sdxl",
    ),
    "XL: T2I-adapter": Kind(t2i_adapter_xl, {"image": CONTROL, **SIZE}, "sdxl"),
}
