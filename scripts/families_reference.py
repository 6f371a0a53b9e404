"""Writes docs/families.md: what each model family supports, from the registry itself and small instances of it.

python scripts/families_reference.py
"""

import tomllib
from pathlib import Path
from typing import Any

from lorakit.core.settings import descriptions
from lorakit.families import DEFAULT, FAMILIES

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "families.md"
HEAD = """# Model families

Made by `scripts/families_reference.py` from the registered families; a test holds it to them. `[model] family = "…"`
chooses one, and everything else of a recipe stays: `scripts/try_families.py` trains, kills, resumes, draws and
exports a small instance of each from one recipe. Each family's settings are in [recipe.md](recipe.md), its file is
`lorakit/families/FAMILY.py`.

Every family is held to its stock pipeline in diffusers: what its backbone is handed at the same latents, time and
caption is recorded and compared, argument by argument (`tests/families/test_protocol.py`), and names, numbers and
sizes of layers are tried on the published configurations without weights. **No published weights have been trained
here.**
"""
ADAPTERS = """
## Adapter files

*By the stock pipeline*: `load_lora_weights` of diffusers reads what is written there, and each export is verified
through it. Other formats that a family has are written too and read back by lorakit (`lorakit.load_adapter`); peft's
folder can be had of every family. Where no format is named the stock pipeline has no loader for adapters at all. The
table is of small instances; diffusers splits kohya's fused layers of FLUX.1 and Chroma at their published widths alone,
and there kohya's layout is what is handed out.
"""
SINGLE = """
## Models in one file

`model.path` may be a `.safetensors` file in the layout that the model was published in, with `model.config`, a
diffusers folder of such a model, beside it. *All*: diffusers reads backbone, VAE and text encoders from it, and what
the file lacks comes from the folder. *Backbone*: it is the backbone's weights; all else comes from the folder.
"""


def reference() -> str:
    """The page's text."""
    tiny = {name: FAMILIES.module(name).tiny() for name in sorted(FAMILIES.names(), key=lambda name: name != DEFAULT)}
    models = [
        (f"`{name}`", _doc(name), family.process.prediction_type, _tasks(family), _encoders(family), _recipes(name))
        for name, family in tiny.items()
    ]
    adapters = [
        (f"`{name}`", f"`{family.default_format}`", _listed(family.stock_formats), _own(family), _targets(family))
        for name, family in tiny.items()
    ]
    single = [(f"`{name}`", _single(family)) for name, family in tiny.items()]
    return "\n".join(
        [
            HEAD,
            *_table(("family", "models", "predicts", "draws", "text encoders", "recipes"), models),
            ADAPTERS,
            *_table(
                ("family", "handed out", "by the stock pipeline", "also written", "adapted where nothing is said"),
                adapters,
            ),
            SINGLE,
            *_table(("family", "in one file"), single),
            "",
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _doc(name: str) -> str:
    return descriptions(FAMILIES.module(name).Settings)["family"].rstrip(".")


def _tasks(family: Any) -> str:
    words = {"text": "from text", "image": "over a picture", "inpaint": "within a mask"}
    return ", ".join(words.get(task, task) for task in family.pipelines)


def _encoders(family: Any) -> str:
    """Which can be adapted, and which stay frozen."""
    kinds = {name: type(part).__name__ for name, part in family.components.items() if name.startswith("text_encoder")}
    adapted = [kind for name, kind in kinds.items() if name in family.text_encoders]
    frozen = [kind for name, kind in kinds.items() if name not in family.text_encoders]
    parts = [f"adaptable: {', '.join(adapted)}"] if adapted else []
    return "; ".join(parts + ([f"frozen: {', '.join(frozen)}"] if frozen else []))


def _recipes(name: str) -> str:
    found = []
    for file in sorted((ROOT / "recipes").glob("*.toml")):
        if tomllib.loads(file.read_text(encoding="utf-8"))["model"].get("family", DEFAULT) == name:
            found.append(f"[{file.stem}](../recipes/{file.name})")
    return ", ".join(found)


def _listed(formats: Any) -> str:
    return ", ".join(f"`{name}`" for name in formats) or "none"


def _own(family: Any) -> str:
    """What is written beside what the stock pipeline reads."""
    kohya = ["kohya"] if family.lora_prefixes else []
    return _listed([name for name in ("diffusers", *kohya) if name not in family.stock_formats])


def _targets(family: Any) -> str:
    return ", ".join(f"`{target}`" for target in family.default_targets[family.backbone])


def _single(family: Any) -> str:
    import diffusers

    if hasattr(getattr(diffusers, family.pipelines["text"]), "from_single_file"):
        return "all, or backbone"
    return "backbone" if hasattr(type(family.components[family.backbone]), "from_single_file") else "no"


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
