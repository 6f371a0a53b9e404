"""The nouns that packages hand each other. Plain frozen data; what acts on it lives with whoever acts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

Text = Mapping[str, Tensor]
"""Conditioning of a batch, tensors of (B, …) by the name that the family gave them, e.g. {"states": (B, L, D)}."""


@dataclass(frozen=True)
class Example:
    """One picture of a source, undecoded.

    `key` is stable and unique in a run (source number and relative path); `digest` is the sha256 of the file's bytes;
    `size` is (width, height) of the upright picture in pixels; `role` is "train" or "regularization".
    """

    key: str
    path: Path
    caption: str
    size: tuple[int, int]
    digest: str
    weight: float = 1.0
    role: str = "train"


@dataclass(frozen=True)
class Batch:
    """One micro step: samples of one bucket.

    `latents` (B, C, h, w) scaled as the backbone takes them; `noise` of the same shape; `quantile` (B,) in [0, 1),
    which a timestep law turns into t; `weight` (B,); `numbers` are the samples' numbers n in the run (what is random
    about a sample follows from its n); `text` is cached conditioning, or None when a text encoder is adapted and
    `captions` are to be encoded.
    """

    keys: tuple[str, ...]
    numbers: tuple[int, ...]
    captions: tuple[str, ...]
    latents: Tensor
    noise: Tensor
    quantile: Tensor
    weight: Tensor
    text: Text | None = None


@dataclass(frozen=True)
class LossReport:
    """`per_example` (B,) unweighted losses with their graph, and the `t` (B,) they were taken at."""

    per_example: Tensor
    t: Tensor


class Predict(Protocol):
    """What an objective sees of a model: a closure over family, text and adapter."""

    def __call__(self, x_t: Tensor, t: Tensor, *, text: Text | None = None, adapter: bool = True) -> Tensor: ...


class Process(Protocol):
    """A forward process and what training and sampling ask of it; `t` is in the process's own unit."""

    timesteps: int
    prediction_type: str

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...
    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor: ...
    def snr(self, t: Tensor) -> Tensor: ...
