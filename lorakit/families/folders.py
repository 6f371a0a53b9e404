"""Finding a model's folder and saying what is wrong with it, before anything heavy is imported."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.embedded import embedded
from lorakit.core.errors import InputError
from lorakit.core.files import printable, sha256_file

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def resolve(path: str, *, weights: bool = True) -> Path:
    """The local folder of a model: "embedded", a folder, or a hub name (fetched, or found in the hub's cache).

    Without `weights` a hub model's configurations and tokenizers alone are fetched. Raises InputError.
    """
    if path == "embedded":
        return embedded("base")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    shown = printable(path)
    if folder.suffix in PICKLES:
        raise InputError(
            f"model.path = {shown}: a pickle can run any code when it is read, so it is refused. "
            "Convert it to a diffusers folder of safetensors first."
        )
    if folder.is_file():
        raise InputError(f"model.path = {shown} is a single file: give a diffusers folder (with model_index.json).")
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _from_hub(path, weights=weights)
    raise InputError(f'model.path = {shown} does not exist: give a diffusers folder, a hub name or "embedded".')


def _from_hub(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    # weights of components: at the root lie single files of the whole model, as large as all of these together
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*/*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub library raises some twenty kinds; each means: not to be had
        raise InputError(
            f"model.path = {printable(name)} is no folder here, and the hub did not give it "
            f"({type(error).__name__}): check the name, the network, or download it to a folder."
        ) from None


def read_config(folder: Path, part: str, file: str = "config.json") -> dict[str, Any]:
    try:
        return json.loads((folder / part / file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(folder / part / file)} could not be read: {printable(error)}") from None


def check(folder: Path, parts: Mapping[str, str], *, pipelines: Sequence[str], weights: bool = True) -> None:
    """That `folder` is a stock folder of one of `pipelines` with every part of `parts` (name to its config's file).

    Without `weights` it may hold configurations and tokenizers alone. Raises InputError with all that is missing.
    """
    where = f"model.path = {printable(folder)}"
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{where} has no model_index.json: it is not a diffusers model folder.")
    kind = read_config(folder, "", "model_index.json").get("_class_name")
    if kind not in pipelines:
        raise InputError(f"{where} is a {kind}, and this family reads {' or '.join(pipelines)}: set model.family.")
    problems = []
    for part, file in parts.items():
        if not (folder / part / file).is_file():
            problems.append(f"{where} lacks the component {part} ({part}/{file}): copy it from the original model.")
        elif weights and file == "config.json" and not any((folder / part).glob("*.safetensors")):
            pickled = sorted(f.name for f in (folder / part).iterdir() if f.suffix in PICKLES)
            problems.append(
                f"{where}: {part} holds only the pickle {pickled[0]}, which is refused: save the model as safetensors."
                if pickled
                else f"{where}: {part} holds no weights (*.safetensors): copy them from the original model."
            )
    if problems:
        raise InputError(problems)


def names(folder: Path, part: str) -> bool:
    """Whether the index of the model in `folder` names a class for the `part`."""
    return any(read_config(folder, "", "model_index.json").get(part) or [])


def load_component(kind: Any, folder: Path) -> Any:
    """The component in `folder`, in fp32, by its class in diffusers or transformers."""
    return kind.from_pretrained(folder, **_loading(folder))


def load_pipeline(kind: Any, folder: Path, parts: Iterable[str], **options: Any) -> Any:
    """The stock pipeline in `folder`, whose weights lie in `parts`, in fp32; `options` are its class's own."""
    pipeline = kind.from_pretrained(folder, **_loading(*(folder / part for part in parts)), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_single_file(file: Path, folder: Path) -> Any:
    """The stock pipeline with the weights in `file` and the configurations and tokenizers in `folder`, in fp32.

    Raises InputError where the stock reader does not find all weights there.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, read_config(folder, "", "model_index.json")["_class_name"])
    where = f"{printable(file)} with the configurations in {printable(folder)}"
    try:
        pipeline = kind.from_single_file(str(file), config=str(folder), local_files_only=True, dtype=torch.float32)
    except Exception as error:  # of a dozen kinds, by what is missing
        raise InputError(
            f"diffusers does not read {where}; are weights missing? It says: {printable(error)}"
        ) from error
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    lacking = [f"{name}.{key}" for name, part in parts.items() for key, p in part.named_parameters() if p.is_meta]
    if lacking:
        raise InputError(f"diffusers does not read {where}: it finds no weights of {lacking[0]}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _loading(*folders: Path) -> dict[str, Any]:
    import torch

    # where there are no others, files in half precision are taken: "model.fp16.safetensors"
    half = any(all(".fp16." in file.name for file in folder.glob("*.safetensors")) for folder in folders)
    return {"dtype": torch.float32, "use_safetensors": True, "variant": "fp16" if half else None}


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a component's safetensors, by their layers' names, from the files' headers alone."""
    from safetensors import safe_open

    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith(".weight"):
                    shapes[key.removesuffix(".weight")] = tuple(file.get_slice(key).get_shape())
    return shapes


def hollow(folder: Path) -> dict[str, Any]:
    """The modules of a model folder by component, made from their configurations: names and shapes, no weights."""
    import diffusers
    import torch
    import transformers

    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    found: dict[str, Any] = {}
    for name, entry in read_config(folder, "", "model_index.json").items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        made = getattr(libraries.get(str(library)), str(kind), None)
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            with torch.device("meta"):
                if library == "diffusers":
                    found[name] = made.from_config(made.load_config(folder / name))  # type: ignore[attr-defined]
                else:
                    found[name] = made(made.config_class.from_pretrained(folder / name))  # type: ignore[attr-defined]
    return found


def fingerprint(*folders: Path) -> str:
    """A digest of all files in `folders`, names and contents."""
    import hashlib

    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            digest.update(f"{folder.name}/{file.relative_to(folder)}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def tokenizers(folder: Path) -> dict[str, Any]:
    """The tokenizers of a model folder, by component."""
    from transformers import AutoTokenizer

    entries = read_config(folder, "", "model_index.json").items()
    kinds = {name: str(entry[1]) for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    try:
        return {name: AutoTokenizer.from_pretrained(folder / name) for name in kinds if "Tokenizer" in kinds[name]}
    except Exception as error:  # of many kinds, by what is missing
        raise InputError(f"{printable(folder)}: a tokenizer could not be read: {printable(error)}") from error
