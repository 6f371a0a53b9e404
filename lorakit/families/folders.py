"""Finding a model's folder and saying what is wrong with it, before anything heavy is imported."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.digests import sha256_of_unchanged, stamp_of
from lorakit.core.embedded import embedded
from lorakit.core.errors import InputError
from lorakit.core.files import printable

PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def resolve(path: str, *, weights: bool = True, revision: str | None = None, key: str = "model.path") -> Path:
    """The local folder of a model: "embedded", a folder, or a hub name (fetched, or found in the hub's cache).

    Without `weights` a hub model's configurations and tokenizers alone are fetched. `key` is the setting that gives the
    path, for messages. Raises InputError.
    """
    if path == "embedded":
        return embedded("base")
    if not path:  # which Path takes for the current folder
        raise InputError(f'{key} is empty: name a diffusers folder, a hub name or "embedded".')
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    shown = printable(path)
    if folder.suffix in PICKLES:
        raise InputError(
            f"{key} = {shown}: a pickle can run any code when it is read, so it is refused. "
            "Convert it to a diffusers folder of safetensors first."
        )
    if folder.is_file():
        raise InputError(
            f"{key} = {shown} is a single file: give a diffusers folder (with model_index.json), alone or beside the "
            "file (model.config in a recipe, --config on the command line)."
        )
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _from_hub(path, weights=weights, revision=revision, key=key)
    raise InputError(f'{key} = {shown} does not exist: give a diffusers folder, a hub name or "embedded".')


def is_local(path: str) -> bool:
    """Whether `path` means a folder or file here, and no name on the hub."""
    return path == "embedded" or Path(path).expanduser().exists()


def _from_hub(name: str, *, weights: bool, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download

    # weights of components: at the root lie single files of the whole model, as large as all of these together
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*/*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub library raises some twenty kinds; each means: not to be had
        version = f" in revision {printable(revision)}" if revision else ""
        raise InputError(
            f"{key} = {printable(name)} is no folder here, and the hub did not give it{version} "
            f"({type(error).__name__}): check the name, the network, or download it to a folder."
        ) from None


def read_config(folder: Path, part: str, file: str = "config.json") -> dict[str, Any]:
    try:
        return json.loads((folder / part / file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(folder / part / file)} could not be read: {printable(error)}") from None


def check(
    folder: Path,
    parts: Mapping[str, str],
    *,
    pipelines: Sequence[str],
    weights: bool = True,
    key: str = "model.path",
) -> None:
    """That `folder` is a stock folder of one of `pipelines` with every part of `parts` (name to its config's file).

    Without `weights` it may hold configurations and tokenizers alone. Raises InputError with all that is missing.
    """
    where = f"{key} = {printable(folder)}"
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


def classes(folder: Path) -> dict[str, Any]:
    """The classes of the modules of the model in `folder`, by component, as its index names them."""
    import diffusers
    import torch
    import transformers

    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    found = {}
    for name, entry in read_config(folder, "", "model_index.json").items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        made = getattr(libraries.get(str(library)), str(kind), None)
        if isinstance(made, type) and issubclass(made, torch.nn.Module):
            found[name] = made
    return found


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a file of weights in `folder`, or in a folder of it, is of this variant."""
    names = [file.name for pattern in ("*.safetensors", "*/*.safetensors") for file in folder.glob(pattern)]
    return any(f".{variant}." in name or f".{variant}-" in name for name in names)


def load_component(kind: Any, folder: Path, dtype: Any = None, variant: str | None = None) -> Any:
    """The component in `folder`, in fp32 or `dtype`, by its class in diffusers or transformers."""
    return kind.from_pretrained(folder, **_loading([folder], dtype, variant))


def load_pipeline(kind: Any, folder: Path, parts: Iterable[Path], variant: str | None = None, **options: Any) -> Any:
    """The stock pipeline in `folder`, whose weights lie in `parts`, in fp32; `options` are its class's own."""
    pipeline = kind.from_pretrained(folder, **_loading(list(parts), None, variant), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def keys(file: Path) -> list[str]:
    """The names of the tensors in a file of weights; InputError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{printable(file)} is no safetensors file that can be read: {printable(error)}") from None


def load_from_file(kind: Any, file: Path, config: Path, dtype: Any = None) -> Any:
    """The component in the single `file`, in fp32 or `dtype`, by its class in diffusers; its configuration in `config`.

    Raises InputError where the class reads no single files, or not this one.
    """
    import torch

    if not hasattr(kind, "from_single_file"):
        raise InputError(
            f"{printable(file)}: diffusers reads no {kind.__name__} from one file: give a diffusers folder."
        )
    try:
        module = kind.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=dtype or torch.float32
        )
    except Exception as error:  # of a dozen kinds, by what is missing
        raise _unread(f"{printable(file)} with the configuration in {printable(config)}", error) from error
    if lacking := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise InputError(f"{printable(file)} has no weights of {kind.__name__}'s {lacking[0]}: it is of another model.")
    return module


def _unread(where: str, error: Exception) -> InputError:
    return InputError(f"diffusers does not read {where}; are weights missing? It says: {printable(error)}")


def load_single_file(file: Path, folder: Path, dtype: Any = None, **given: Any) -> Any:
    """The stock pipeline with the weights in `file` and the configurations and tokenizers in `folder`, in fp32 or
    `dtype`; components that are `given` are not looked for.

    Raises InputError where the stock reader does not find all weights there.
    """
    import diffusers
    import torch

    kind = getattr(diffusers, read_config(folder, "", "model_index.json")["_class_name"])
    where = f"{printable(file)} with the configurations in {printable(folder)}"
    try:
        pipeline = kind.from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype or torch.float32, **given
        )
    except Exception as error:  # of a dozen kinds, by what is missing
        raise _unread(where, error) from error
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    lacking = [f"{name}.{key}" for name, part in parts.items() for key, p in part.named_parameters() if p.is_meta]
    if lacking:
        raise InputError(f"diffusers does not read {where}: it finds no weights of {lacking[0]}.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _loading(parts: Sequence[Path], dtype: Any, variant: str | None) -> dict[str, Any]:
    import torch

    # where there are no others, files in half precision are taken: "model.fp16.safetensors"
    half = any(all(".fp16." in file.name for file in part.glob("*.safetensors")) for part in parts)
    said = variant if variant and any(has_variant(part, variant) for part in parts) else None
    return {"dtype": dtype or torch.float32, "use_safetensors": True, "variant": said or ("fp16" if half else None)}


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
    """The modules of a model folder by component: names and shapes, no weights."""
    return {name: hollow_component(kind, folder / name) for name, kind in classes(folder).items()}


def hollow_component(kind: Any, folder: Path) -> Any:
    """The component of which `folder` has the configuration, without weights, by its class in diffusers or
    transformers."""
    import torch

    with torch.device("meta"):
        if hasattr(kind, "from_config"):  # diffusers'
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))


def fingerprint(*folders: Path) -> str:
    """A digest of all files in `folders`, names and contents."""
    import hashlib

    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else [folder]:
            own = _digest(file, stamp_of(file.stat()))
            digest.update(f"{folder.name}/{file.relative_to(folder)}:{own}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _digest(file: Path, stamp: str) -> str:
    """Of a file as it is, which several ask for; `stamp` says when it is another."""
    return sha256_of_unchanged(file)


def tokenizers(folder: Path) -> dict[str, Any]:
    """The tokenizers of a model folder, by component."""
    from transformers import AutoTokenizer

    entries = read_config(folder, "", "model_index.json").items()
    kinds = {name: str(entry[1]) for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    try:
        return {name: AutoTokenizer.from_pretrained(folder / name) for name in kinds if "Tokenizer" in kinds[name]}
    except Exception as error:  # of many kinds, by what is missing
        raise InputError(f"{printable(folder)}: a tokenizer could not be read: {printable(error)}") from error
