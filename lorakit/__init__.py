"""lorakit: teach a latent diffusion model something new with low-rank adapters.

    recipe = lorakit.load_recipe("recipes/photos_cpu.toml", overrides=["data.sources.0.path=photos"])
    result = lorakit.train(recipe)
    lorakit.export_adapter(result.output, format="diffusers", out="photos.safetensors")

The names below are imported when they are first used: `import lorakit` itself costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.export import export_adapter as export_adapter
    from lorakit.export import load_adapter as load_adapter
    from lorakit.export import merge_adapter as merge_adapter
    from lorakit.recipe import Recipe as Recipe
    from lorakit.recipe import load_recipe as load_recipe
    from lorakit.verbs.train import RunResult as RunResult
    from lorakit.verbs.train import resume as resume
    from lorakit.verbs.train import train as train

_HOMES = {
    "Recipe": "lorakit.recipe",
    "RunResult": "lorakit.verbs.train",
    "export_adapter": "lorakit.export",
    "load_adapter": "lorakit.export",
    "load_recipe": "lorakit.recipe",
    "merge_adapter": "lorakit.export",
    "resume": "lorakit.verbs.train",
    "train": "lorakit.verbs.train",
}
_PACKAGES = ("adapters", "data", "diffusion", "evaluation", "export", "families", "optimizers", "sampling", "training")

__all__ = [*_HOMES, *_PACKAGES]  # pyright: ignore
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"lorakit.{name}")
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
