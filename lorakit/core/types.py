"""The nouns that packages hand each other. Plain frozen data; what acts on it lives with whoever acts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Text = Mapping[str, Tensor]
"""Conditioning of a batch, tensors of (B, …) by the name that the family gave them, e.g. {"states": (B, L, D)}."""


Task = Literal["text", "inpaint", "edit"]
"""What a model was made for: to draw from text, to paint a part of a picture anew, or to edit one as a text says."""


class Place(NamedTuple):
    """Where a picture's bytes lie in its source.

    `file` is relative to the source's root; a tar's member is the stretch of it from `start`, `length` bytes; a table's
    row is number `start` of file "".
    """

    file: str
    start: int = 0
    length: int = -1


@dataclass(frozen=True, slots=True)
class Example:
    """One picture of a source, undecoded.

    `key` is stable and unique in a run (source number and name); `captions` are as written, before the source's
    algebra, and ("",) where there is none; `size` is (width, height) of the upright picture in pixels; `digest` is the
    sha256 of its bytes; `role` is "train", "regularization" or "validation"; `focus` is the point (x, y), in 0 … 1 of
    the upright picture, that crops keep in the middle; `mask` is where its mask lies, the picture's own place where its
    transparency is the mask; `input` is where the picture lies that an editing model makes this one of; `look` is what
    pictures that look alike have in common.
    """

    key: str
    source: int
    place: Place
    captions: tuple[str, ...]
    size: tuple[int, int]
    digest: str
    role: str = "train"
    mask: Place | None = None
    mask_digest: str = ""
    focus: tuple[float, float] | None = None
    look: int = 0
    input: Place | None = None
    input_digest: str = ""


@dataclass(frozen=True)
class Batch:
    """One micro step: samples of one bucket.

    `latents` (B, C, h, w) scaled as the backbone takes them, or None where `pixels` (B, 3, H, W) in -1 … 1 are to be
    encoded first; `noise` of the latents' shape; `quantile` (B,) in [0, 1), which a timestep law turns into t; `weight`
    (B,); `numbers` are the samples' numbers n in the run (what is random about a sample follows from its n). `text` is
    cached conditioning, or None when a text encoder is adapted and `captions` are to be encoded. `class_captions` are
    the texts at which the model is to stay what it was, None of a sample without, () where nobody asks; `class_text` is
    their conditioning, in the same way (that of no words where a sample has none). `sizes` (B, 6) are original height
    and width, the crop's top and left, and the target's height and width, all in pixels (SDXL's conditioning: Podell et
    al. 2023, arXiv:2307.01952, §2.2). `mask` (B, 1, h, w) says in 0 … 1 what of a picture counts; None: all of it.
    `extra` are further random numbers of the samples, (B, …) by name, which the objective asked for; validation has
    none. `given` is what the model is shown besides the caption, (B, …) by name, for `Family.encode_given` to make
    `beside` of (B, K, h, w), which the backbone sees beside x_t; objectives need not know of either.
    """

    keys: tuple[str, ...]
    numbers: tuple[int, ...]
    captions: tuple[str, ...]
    latents: Tensor | None
    noise: Tensor
    quantile: Tensor
    weight: Tensor
    text: Text | None = None
    class_captions: tuple[str | None, ...] = ()
    class_text: Text | None = None
    sizes: Tensor | None = None
    mask: Tensor | None = None
    pixels: Tensor | None = None
    extra: Mapping[str, Tensor] | None = None
    given: Mapping[str, Tensor] | None = None
    beside: Tensor | None = None


@dataclass(frozen=True)
class LossReport:
    """`per_example` (B,) unweighted losses with their graph, and the `t` (B,) they were taken at.

    `preservation` (B,) is what is added to them for having left the base where it was to be kept; None: it is kept
    nowhere.
    """

    per_example: Tensor
    t: Tensor
    preservation: Tensor | None = None


class Predict(Protocol):
    """What an objective sees of a model: a closure over family, text and adapter.

    `text` is conditioning or captions to be encoded, None the batch's own captions. Without the `adapter` the whole
    model is the base, its text encoders too.
    """

    def __call__(
        self, x_t: Tensor, t: Tensor, *, text: Text | Sequence[str] | None = None, adapter: bool = True
    ) -> Tensor: ...


class Process(Protocol):
    """A forward process and what training and sampling ask of it; `t` is in the process's own unit.

    A picture takes at least `least_steps` steps, and at most `most_steps` where its times are counted.
    """

    timesteps: int
    prediction_type: str
    least_steps: int
    most_steps: int | None

    def at(self, share: Tensor) -> Tensor: ...
    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...
    def predict_x0(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor: ...
    def snr(self, t: Tensor) -> Tensor: ...
