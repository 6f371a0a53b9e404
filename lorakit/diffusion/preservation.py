"""Holding a model to what it was while it learns: how far its prediction has moved from the base's, and where.

The base is the same `predict` with the adapter off, text encoders too, and no gradient flows into it. An adapter that
changes nothing costs nothing here: the term begins at exactly zero. Not here: what a difference costs (`losses.py`,
`objectives/denoising.py`), and pictures of a class to train on as well (a source of role "regularization").

What other trainers call them: differential output and blank prompt preservation, ai-toolkit; masked prior preservation,
OneTrainer. Measured beside each other in docs/preservation.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core import settings as core_settings
from lorakit.core.transfer import sent
from lorakit.core.types import Batch, Predict, Text


class NoPreservation(core_settings.Settings):
    kind: Literal["none"] = "none"
    """Nothing but what the pictures teach."""
    at: ClassVar[Literal["class", "blank", "caption"] | None] = None


class _Kept(core_settings.Settings):
    weight: float = Field(1.0, gt=0)
    """Factor on the term; 1: it counts as much as denoising."""


class DifferentialOutput(_Kept):
    kind: Literal["differential_output"]
    """Training pictures with their class text in place of the caption are predicted as by the base: the name is learnt,
    and not what else it could be. Needs a source's class_words or class_prompt. Two more forwards, one with gradient:
    about twice the time and memory of activations."""
    at: ClassVar[Literal["class"]] = "class"


class BlankPrompt(_Kept):
    kind: Literal["blank_prompt"]
    """Training pictures without any text are predicted as by the base, so that what the adapter does depends on the
    prompt. Guidance compares with this very prediction and then multiplies all that the adapter does, at other prompts
    too (measured in docs/preservation.md). Costs as much as differential_output."""
    at: ClassVar[Literal["blank"]] = "blank"


class MaskedPrior(_Kept):
    kind: Literal["masked_prior"]
    """Outside a picture's mask the prediction is held to the base's at the same text. Needs masks. One more forward,
    without gradient: about a third more time."""
    at: ClassVar[Literal["caption"]] = "caption"


Preservation = Annotated[NoPreservation | DifferentialOutput | BlankPrompt | MaskedPrior, Field(discriminator="kind")]


@dataclass(frozen=True)
class Drift:
    """How far the prediction is from the base's (B, C, h, w), and what of a picture counts in it (B, 1, h, w)."""

    difference: Tensor
    share: Tensor


def preserve(
    settings: DifferentialOutput | BlankPrompt | MaskedPrior,
    predict: Predict,
    batch: Batch,
    x_t: Tensor,
    t: Tensor,
    predicted: Tensor,
) -> Drift | None:
    """The drift at x_t and t, where `predicted` is what the model says at the batch's own text; None where none of the
    batch is held."""
    text: Text | Sequence[str] | None
    if settings.at == "caption":
        if batch.mask is None:
            return None
        text, held, share = batch.text, predicted, 1 - batch.mask
    else:
        present = [caption is not None for caption in batch.class_captions]
        if not any(present):
            return None
        # the whole batch, since a part of it would be another batch to the model: its sizes go with it
        text = batch.class_text if batch.class_text is not None else [text or "" for text in batch.class_captions]
        held = predict(x_t, t, text=text).float()
        share = sent(present, x_t.device).to(held).view(-1, 1, 1, 1).expand_as(held[:, :1])
    with torch.no_grad():
        base = predict(x_t, t, text=text, adapter=False).float()
    return Drift(held - base, share)
