"""What the rest of the house asks of a model family."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lorakit.core.types import Process, Task, Text


@dataclass(frozen=True)
class Description:
    """What is known of a model without its weights.

    `side_multiple` is what picture sides must be a multiple of, in pixels, and `drawing_multiple` those that the stock
    pipeline draws; `resolution` the side it was trained at, in `process`; `token_limit` how many tokens of a caption
    count, with `count_tokens(caption)` in the same unit. `backbone`, `default_targets` and `lora_prefixes` are the
    family's own; `weight_shapes(component)` gives the shapes of the weights of its layers by name, empty where the
    files are not here. A picture of (width, height) is `latent_size` numbers, a caption `text_size`. `task` is what the
    model was made for.
    """

    side_multiple: int
    drawing_multiple: int
    resolution: int
    process: Process
    token_limit: int
    count_tokens: Callable[[str], int]
    backbone: str
    default_targets: Mapping[str, tuple[str, ...]]
    lora_prefixes: Mapping[str, str]
    weight_shapes: Callable[[str], Mapping[str, tuple[int, ...]]]
    latent_size: Callable[[int, int], int]
    text_size: int
    task: Task = "text"


class Names(Protocol):
    """How adapter files call the layers of a model: what reading one needs to know, of a family or any pipeline.

    `components` holds the modules by the names of the stock pipeline ("unet", "vae", "text_encoder"); `backbone` names
    the denoiser among them and `text_encoders` those that an adapter may go into. `lora_prefixes` are the prefixes of
    the kohya layout, none where it has no names for the model's layers. `fused` are linear layers that are one in the
    published layout and several here: "<component>.<its name there>" to the parts' "<component>.<path>", in the order
    of their rows.
    """

    name: str
    components: Mapping[str, nn.Module]
    backbone: str
    text_encoders: tuple[str, ...]
    lora_prefixes: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]

    def original_name(self, component: str, path: str) -> str:
        """The published layout's dotted name of a module, e.g. with the `text_model.` that transformers dropped."""
        ...


@runtime_checkable
class SingleFile(Names, Protocol):
    """The names of a family whose models are also passed on as one file, in the layout that they were published in."""

    def single_file_key(self, component: str, path: str) -> tuple[str, int, int]:
        """The key of a module's weight in such a file; which group of its rows is the module's, of how many equal ones.

        Most weights are their module's alone: 0 of 1.
        """
        ...


class Family(Names, Protocol):
    """A frozen model, its text encoders and its VAE, and how they are called.

    All but the VAE is kept in `dtype`. `default_targets` gives, for the backbone and each text encoder, the endings of
    the names of the modules that an adapter goes into. `stock_formats` are those that the stock pipeline loads for a
    model of this size; files of other formats are read back by lorakit alone. `task` is what the model was made for,
    and `pipelines` are the classes of the stock pipelines by what they draw from: "text", and where there are such,
    "image" and "inpaint", or "edit". Sides of training pictures are multiples of `side_multiple` pixels, of what the
    stock pipeline draws multiples of `drawing_multiple`. Those of other tasks than "text" have `encode_given`, and
    their `predict` takes `beside`.
    """

    path: Path
    dtype: Any
    process: Process
    default_targets: Mapping[str, tuple[str, ...]]
    default_format: str
    stock_formats: tuple[str, ...]
    task: Task
    pipelines: Mapping[str, str]
    side_multiple: int
    drawing_multiple: int
    token_limit: int

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to latents as the backbone takes them."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """The shape (C, h, w) of the latents of a picture of these pixels."""
        ...

    def encode_text(self, captions: Sequence[str], *, weighted: bool = False) -> Text:
        """Conditioning of `captions`, padded and truncated as the stock pipeline does it.

        `weighted`: "(tag:1.3)" in them is emphasis; InputError where the family cannot honour it.
        """
        ...

    def encode_given(self, given: Mapping[str, Tensor]) -> Tensor:
        """What the backbone sees beside x_t, (B, K, h, w).

        Of "pixels" (B, 3, H, W) in -1 … 1, and for inpainting "mask" (B, 1, H, W), 1 where they are to be painted anew
        and else 0; for editing "latents" that came of this method may stand for them, and "dropped" (B,) is 1 for those
        that are not to be seen.
        """
        ...

    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, *, sizes: Tensor | None = None, beside: Tensor | None = None
    ) -> Tensor:
        """What the backbone says, in the sense of the process's prediction type; `t` (B,) in the process's unit.

        `text` is all that does not change with t, under the names that this family's encoders gave it. `sizes` (B, 6)
        are a batch's, for a family that is told them; None: of uncropped pictures of the latents' size, as the stock
        pipeline says when nothing else is asked for. `beside` is `encode_given`'s; None: of nothing that is shown.
        """
        ...

    def to(self, device: Any, dtype: Any, *, only: Iterable[str] | None = None) -> None:
        """Moves the frozen parts, or `only` these components; those that are read later come there when they are."""
        ...

    def at_hand(self, names: Iterable[str] | None = None) -> AbstractContextManager[None]:
        """Within it these components, or all, have their weights: what was to be read `later` is read for it."""
        ...

    def live_pipeline(self, task: str = "text") -> Any:
        """The stock pipeline for a `task` of `pipelines` around these very components, adapters included."""
        ...

    def stock_pipeline(self, *, without: Iterable[str] = ()) -> Any:
        """A fresh stock pipeline in fp32 from the same files; components that it is `without` are not read."""
        ...

    def metadata(self) -> dict[str, str]:
        """Entries of an adapter file that tell other programs which model it belongs to."""
        ...

    def fingerprint(self, component: str) -> str:
        """A digest of the component's files, for caches."""
        ...


def guided(family: Family) -> Callable[[float, str], Mapping[str, Any]]:
    """How a family's stock pipelines are told of guidance: from its scale, of which 1 is none, and a negative prompt.

    Families whose pipelines have other words for it, or another scale, have a method `guided` for it; it raises
    InputError for what they have no words for.
    """
    return getattr(family, "guided", classifier_free)


def stock_reads(family: Family, format: str, layers: Iterable[str]) -> bool:
    """Whether a family's stock pipeline loads an adapter of `layers` in `format`, and leaves none of them out.

    Families whose loader leaves some out have `unread`, words that these have in their names, by format.
    """
    unread: tuple[str, ...] = getattr(family, "unread", {}).get(format, ())
    return format in family.stock_formats and not any(word in layer for layer in layers for word in unread)


def classifier_free(scale: float, negative_prompt: str) -> dict[str, Any]:
    """What most stock pipelines are told."""
    return {"guidance_scale": scale, "negative_prompt": negative_prompt or None}
