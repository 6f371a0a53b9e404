"""What families do alike: a class of each of their two kinds, of names of layers and of a frozen model."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.memory import give_back
from lorakit.core.types import Task
from lorakit.families import folders, vae
from lorakit.families.source import Source

SCHEDULER = "scheduler_config.json"


class Names:
    """How adapter files call the layers of these components, of which some may be None; see `protocol.Names`."""

    text_encoders: tuple[str, ...] = ()
    lora_prefixes: Mapping[str, str] = {}

    def __init__(self, components: Mapping[str, Any]) -> None:
        self.components: dict[str, Any] = {
            name: part for name, part in components.items() if isinstance(part, nn.Module)
        }
        self.text_encoders = tuple(name for name in self.text_encoders if name in self.components)

    @property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        return {}

    def original_name(self, component: str, path: str) -> str:
        return path


class Frozen(Names):
    """A model on a VAE's latents, in patches of `patch` × `patch`; see `protocol.Family`."""

    task: Task = "text"
    pipelines: Mapping[str, str]
    stock_options: Mapping[str, Any] = {}  # of the stock pipeline's class

    def __init__(self, source: Source, components: Mapping[str, Any], *, patch: int = 1) -> None:
        super().__init__(components)
        self.source = source
        self.path = source.folder
        self.vae = self.components["vae"]
        self.dtype = source.dtype or torch.float32
        self.device = torch.device("cpu")
        self.reading: Mapping[str, object] = {}  # what else decides what an encoder says, for caches
        # components whose weights are in their files alone
        self.away = tuple(name for name, part in self.components.items() if next(part.parameters()).is_meta)
        self.factor = vae.factor(source.folder)
        self.side_multiple = self.drawing_multiple = self.factor * patch

    def to(self, device: Any, dtype: Any, *, only: Iterable[str] | None = None) -> None:
        """Moves the components, and all but the VAE to `dtype` unless they were read in one that the settings say."""
        self.device, self.dtype = torch.device(device), self.source.dtype or dtype
        for name in self.components if only is None else only:
            if name not in self.away:
                self._place(name, self.components[name])

    def _place(self, name: str, module: nn.Module) -> None:
        module.to(device=self.device, dtype=self.dtype if name != "vae" and self.source.dtype is None else None)

    @contextlib.contextmanager
    def at_hand(self, names: Iterable[str] | None = None) -> Iterator[None]:
        wanted = [name for name in self.away if names is None or name in names]
        self.away = tuple(name for name in self.away if name not in wanted)
        try:
            if wanted:
                for name, fresh in self.source.read({name: type(self.components[name]) for name in wanted}).items():
                    self._place(name, fresh)
                    # others know the module already: it becomes what was read, with all that was set up in it
                    self.components[name].__dict__ = fresh.__dict__
            yield
        finally:
            self.away += tuple(wanted)
            for name in wanted:
                self.components[name].to("meta")
            if wanted:
                give_back()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean, normalised: (B, C, H/f, W/f)."""
        return vae.encode(self.vae, pixels)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    def stock_pipeline(self, *, without: Iterable[str] = ()) -> Any:
        options = {**self.stock_options, **dict.fromkeys(without)}
        return self.source.stock_pipeline(self.pipelines[self.task], **options)

    def fingerprint(self, component: str) -> str:
        tokenizer = component.replace("text_encoder", "tokenizer")
        own = self.source.fingerprint(component, *([tokenizer] if tokenizer != component else []))
        return f"{own}-{self.reading[component]}" if component in self.reading else own


def pipeline(family: Any, task: str, **parts: Any) -> Any:
    """The stock pipeline for a `task` around the components of `family` and `parts`, tokenizers for instance."""
    import diffusers

    config = folders.read_config(family.path, "scheduler", SCHEDULER)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    made = getattr(diffusers, family.pipelines[task])(**{**family.components, **parts}, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def drawing_as_asked(pipeline: Any, side: int) -> Any:
    """`pipeline`, which now draws at the size asked for, else at `side`, and not at the nearest of those it knows."""
    processor = pipeline.image_processor
    processor.classify_height_width_bin = lambda height, width, ratios: (height or side, width or side)
    processor.resize_and_crop_tensor = lambda picture, width, height: picture
    return pipeline
