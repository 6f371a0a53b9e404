"""Finding the folder of a model that captions pictures, and what kind of writer it is for."""

import json
from pathlib import Path
from typing import Any

from lorakit.core.errors import InputError
from lorakit.core.files import printable

TAGS = "selected_tags.csv"  # what tells a tagger's folder
TAGGER = "model.onnx"
_SMALL = ["*.json", "*.txt", "*.jinja", "*.model", TAGS]  # all but weights


def kind_at(model: str) -> str:
    """The kind of writer that the model at a path or of a hub name is for."""
    return "tagger" if (resolve(model, files=_SMALL) / TAGS).is_file() else "vlm"


def resolve(model: str, *, files: list[str] | None = None) -> Path:
    """The local folder of a model: a folder, or a hub name, of which `files` (None: weights too) are fetched.

    Raises InputError where there is none.
    """
    folder, shown = Path(model).expanduser(), printable(model)
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise InputError(f"model = {shown} is a single file: name its folder.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(f"model = {shown} does not exist: name the folder of a model, or give a hub name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=files or [*_SMALL, "*.safetensors"]))
    except Exception as error:  # the hub library raises some twenty kinds; each means: not to be had
        raise InputError(
            f"model = {shown} is no folder here, and the hub did not give it ({type(error).__name__}): check the "
            "name, the network, or download it to a folder."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; InputError where there is none, or the folder is that of a model that draws."""
    where = f"model = {printable(folder)}"
    if (folder / "model_index.json").is_file():
        raise InputError(f"{where} is a model that draws pictures (it has a model_index.json).")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no table")
    except FileNotFoundError:
        raise InputError(
            f"{where} has neither config.json (a vision-language model) nor {TAGGER} with {TAGS} (a tagger)."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: config.json could not be read: {printable(error)}.") from None
    return config
