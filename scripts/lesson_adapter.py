"""The sections of docs/latent-diffusion.md on the adapter: what it is made of, and what it does to the base."""

import json
from collections.abc import Callable
from typing import Any

import figures
import torch
from figures import Row
from lesson_base import Model, Section, percent, share_right
from PIL import Image

from lorakit.adapters.lora import PartSettings, Settings, weight_count
from lorakit.adapters.state import FIRST, SECOND, adaptable_layers
from lorakit.core.embedded import embedded
from lorakit.evaluation.judge import load_judge
from lorakit.export.merge import product
from lorakit.recipe import load_recipe

LAYER = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v"


def low_rank(model: Model) -> Section:
    """W + alpha / rank · B A: a layer's weights, and the two thin matrices that were trained beside them."""
    learned, (component, _, path) = model.learned, LAYER.partition(".")
    layer: Any = adaptable_layers(model.family.components[component])[path]
    A, B = learned.tensors[LAYER + FIRST], learned.tensors[LAYER + SECOND]
    rank, alpha = len(A), learned.alphas[LAYER]
    change = alpha / rank * product(A, B)
    tiles: list[tuple[Image.Image | None, str]] = []
    for name, matrix in (("W", layer.weight), ("B", B), ("A", A), ("alpha / rank · B A", change)):
        picture = figures.signed(matrix, reach=3 * float(matrix.std()))
        tiles.append((figures.centred(picture, 128), f"{name}\n{matrix.shape[0]} x {matrix.shape[1]}"))
    recipe = load_recipe(embedded("mascot") / "recipe.toml")
    parts = {"unet": recipe.adapter, "text_encoder": recipe.adapter.text_encoder}
    trained, whole = 0, 0
    for name, settings in parts.items():
        assert isinstance(settings, (Settings, PartSettings))
        shapes = {n: tuple(m.weight.shape) for n, m in adaptable_layers(model.family.components[name]).items()}
        trained += weight_count(shapes, settings, settings.targets or model.family.default_targets[name])
        whole += sum(p.numel() for p in model.family.components[name].parameters())
    assert trained == sum(tensor.numel() for tensor in learned.tensors.values())
    singular = torch.linalg.svdvals(change)
    numbers = {
        "rank": f"{rank}",
        "layer_weights": f"{layer.weight.numel():,}",
        "layer_adapter": f"{A.numel() + B.numel():,}",
        "adapted_layers": f"{len(learned.layers())}",
        "adapter_weights": f"{trained:,}",
        "base_weights": f"{whole:,}",
        "adapter_share": percent(trained / whole),
        "change_size": percent(float(change.norm() / layer.weight.norm())),
        "first_four": percent(float(singular[:4].square().sum() / singular.square().sum())),
    }
    return Section({"low-rank": figures.sheet([Row("", tiles)], side=128)}, numbers)


def strength(model: Model) -> Section:
    """Pictures at weight · alpha / rank · B A: of what was learned, and of what was known before."""
    effort, judge = model.effort, load_judge()
    prompts = json.loads((embedded("mascot") / "prompts.json").read_text())
    new, old = (prompts[name][: effort.prompts] for name in ("subject", "old"))
    shown = [
        "a zorp on a blue background",
        "a big zorp on an orange background",
        "a red circle on a blue background",
        "a green star on a white background",
    ]
    rows = [Row(name, []) for name in ("new", "new", "old", "old")]
    numbers = {"subject_prompts": f"{len(new)}", "old_prompts": f"{len(old)}"}
    for weight in effort.weights:
        adapted, key = model.with_adapter(weight), f"{weight:g}".replace(".", "_")
        for row, caption in zip(rows, shown):
            picture = adapted.draw([caption], model.noise(1, caption))[0]
            row.tiles.append((picture, f"weight {weight:g}" if row is rows[-1] else ""))
        of_new, of_old = (
            adapted.draw([entry["prompt"] for entry in asked], model.noise(len(asked), f"strength {kind}"))
            for kind, asked in (("new", new), ("old", old))
        )
        numbers[f"subject_at_{key}"] = percent(sum(v.subject >= 0.5 for v in judge.look(of_new)) / len(new))
        numbers[f"old_at_{key}"] = percent(share_right(judge, old, of_old))
    return Section({"strength": figures.sheet(rows, side=104)}, numbers)


SECTIONS: tuple[Callable[[Model], Section], ...] = (low_rank, strength)
