"""lorakit/data/repaint.py: masks by rule, of 0 and 1, in the picture, of boxes and strokes and of all."""

import torch

from lorakit.core.seeding import generator
from lorakit.data.repaint import WHOLE, draw_mask

SIZES = [(64, 64), (200, 40), (33, 512), (8, 8)]


def masks(count: int, size: tuple[int, int] = (64, 48)) -> torch.Tensor:
    return torch.stack([draw_mask(*size, generator("test", n)) for n in range(count)])


def test_a_mask_follows_from_its_generator_and_fits_the_picture() -> None:
    for width, height in SIZES:
        found = [draw_mask(width, height, generator("test", 7)) for _ in range(2)]
        assert torch.equal(*found) and found[0].shape == (1, height, width)
        assert set(masks(20, (width, height)).unique().tolist()) == {0.0, 1.0}


def test_nothing_is_never_asked_for_and_all_as_often_as_is_said() -> None:
    areas = masks(2000).mean((1, 2, 3))
    assert areas.min() > 0
    whole = (areas == 1).float().mean()
    assert abs(whole - WHOLE) < 0.04  # four standard errors
    assert 0.15 < areas[areas < 1].mean() < 0.5


def test_a_part_is_boxes_and_another_is_not() -> None:
    """Of a single box all rows that it is in are alike."""
    found = [mask[0] for mask in masks(400) if mask.mean() < 1]
    boxes = [len(mask[mask.any(1)].unique(dim=0)) == 1 for mask in found]
    assert 0.1 < sum(boxes) / len(boxes) < 0.6


def test_everywhere_is_asked_for_about_as_often() -> None:
    areas = masks(2000, (32, 32)).mean(0)[0]
    assert areas.min() > WHOLE and areas[8:24, 8:24].min() > 0.4
    assert abs(areas[:, :16].mean() - areas[:, 16:].mean()) < 0.05
