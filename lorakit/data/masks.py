"""What of a picture counts: a mask's values in 0 … 1, cut as the picture is.

Here: from a mask's pixels to the latents' grid. Not here: where masks come from (`sources/`) and what the loss makes of
them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorakit.data.colour import continuous, eight_bit, has_alpha


def grey(image: Image.Image) -> Image.Image:
    """A mask picture's values, 0 … 255: how light it is, and what is transparent does not count.

    Colour profiles are left out of account: a mask holds amounts, not colours.
    """
    plain = continuous(eight_bit(image))
    if not has_alpha(plain):
        return plain.convert("L")
    ground = Image.new("L", plain.size, 0)
    ground.paste(plain.convert("RGB").convert("L"), mask=plain.getchannel("A"))
    return ground


def values(image: Image.Image) -> Tensor:
    """An L image as float32 (1, H, W) in 0 … 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)


def pool_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`mask` (1, H, W) averaged over the area of each cell of a grid: (1, h, w) for `size` = (h, w)."""
    return F.adaptive_avg_pool2d(mask, size)
