"""Values and batches come to a device whole. That the host does not wait meanwhile: tests/training/test_step.py."""

import torch

from lorakit.core.transfer import on_device, sent
from lorakit.core.types import Batch


def test_values_are_sent_as_they_are() -> None:
    here = sent([1.5, -2.0], torch.device("cpu"))
    assert torch.equal(here, torch.tensor([1.5, -2.0])) and sent((), torch.device("cpu")).numel() == 0
    assert sent([True, False], torch.device("meta")).device.type == "meta"


def test_all_tensors_of_a_batch_go_and_nothing_else_changes() -> None:
    ones = torch.ones(2)
    batch = Batch(("a", "b"), (0, 1), ("x", "y"), ones, ones, ones, ones, text={"states": ones}, given={"mask": ones})
    gone = on_device(batch, torch.device("meta"))
    tensors = (gone.latents, gone.noise, gone.quantile, gone.weight, *gone.text.values(), *gone.given.values())
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (gone.keys, gone.numbers, gone.captions, gone.pixels) == (("a", "b"), (0, 1), ("x", "y"), None)
