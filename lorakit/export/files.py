"""Adapter files on disk: safetensors only, whole or not at all, the same bytes for the same adapter.

Which keys they hold is a dialect's affair (dialects/); whether another program makes the same of them, verify.py's.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.state import with_alphas
from lorakit.core.errors import InputError
from lorakit.core.files import folder_aside, printable, safetensors_bytes, write_bytes
from lorakit.export.alphas import stored_alpha
from lorakit.export.container import CONFIG, DTYPE_OF, WEIGHTS, open_adapter
from lorakit.export.dialects import DIALECTS
from lorakit.export.digests import DIGEST, adapter_digest, data_hash
from lorakit.export.fused import fused_alphas
from lorakit.export.keymap import FIRST, split_key
from lorakit.export.kinds import other_kind
from lorakit.export.metadata import adapter_metadata
from lorakit.families.protocol import Family, Names

log = logging.getLogger("lorakit")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, before any model gives it meaning; of a folder, keys begin with "<component>/"."""

    path: Path
    format: str
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def dialect(self) -> ModuleType:
        return DIALECTS.module(self.format)


def unsuited(format: str, lora_prefixes: Mapping[str, str]) -> str | None:
    """Why a family with these prefixes has no files of this format, if so."""
    if lora_prefixes or not DIALECTS.module(format).PREFIXED:
        return None
    return f"the format {format} is not for this model, whose layers have no names in it: use diffusers'."


def refuse_misnamed(path: Path, format: str) -> None:
    folder = DIALECTS.module(format, where="format").FOLDER
    if (path.suffix == ".safetensors") == folder:
        what = "a folder, not a file" if folder else "a file ending in .safetensors"
        raise InputError(f"{printable(path)}: the format {format} is {what}: choose another name.")


def write_adapter(
    state: AdapterState,
    path: Path,
    *,
    format: str,
    family: Family,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes `state` in a dialect, weights in `dtype`, in place of what is at `path`; `metadata` is added to our own.

    Raises InputError for an unknown format, one that is not for this family, a kind that it cannot carry, a layer that
    the family does not have, a value that `dtype` cannot hold and a path that does not end as the format asks for,
    StorageError where the disk refuses.
    """
    dialect = DIALECTS.module(format, where="format")
    refuse_misnamed(path, format)
    if problem := unsuited(format, family.lora_prefixes):
        raise InputError(problem)
    if state.kind not in dialect.KINDS:
        able = [name for name in DIALECTS.names() if state.kind in DIALECTS.module(name).KINDS]
        raise InputError(
            f"the format {format} cannot carry an adapter of the kind {printable(state.kind)}: its readers would drop "
            f"a part or make another adapter of it. Write {' or '.join(able) or 'no file'}, or merge it into its base."
        )
    state = readable(state, format, family)
    entries = {**adapter_metadata(state, family, name=path.stem), **(metadata or {})}
    tensors, entries = dialect.write(state, family, entries)
    tensors = _cast(tensors, dtype)
    if dialect.FOLDER:
        _write_folder(path, dialect, tensors, entries)
        return
    weights = data_hash(tensors)
    entries |= {"sshs_model_hash": weights, "modelspec.hash_sha256": f"0x{weights}"}
    entries |= {DIGEST: sealed(dialect, tensors, entries)}
    write_bytes(path, safetensors_bytes(tensors, entries))


def readable(state: AdapterState, format: str, family: Names) -> AdapterState:
    """`state` as all readers of the dialect understand it: one alpha in the components where they ask for that.

    It is the alpha of most layers, whose weights stay as they are to the bit. Layers that are written as one get its
    alpha/rank.
    """
    components = getattr(DIALECTS.module(format), "ONE_ALPHA", ())
    alphas = {**state.alphas, **(fused_alphas(state, family) if components else {})}
    for component in components:
        own = {layer: state.alphas[layer] for layer in state.layers() if layer.startswith(f"{component}.")}
        usual = Counter(alpha for alpha in own.values() if alpha).most_common(1)
        alphas |= dict.fromkeys(own, usual[0][0]) if usual else {}
    return state if alphas == state.alphas else with_alphas(state, alphas)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # alphas (single numbers) stay in fp32: half precision would round some
    cast = {k: t.detach().cpu().to(dtype if t.ndim else t.dtype).contiguous() for k, t in tensors.items()}
    lost = [k for k, t in cast.items() if not t.isfinite().all()]
    if lost:
        raise InputError(
            f"{len(lost)} tensors hold values that {dtype_name(dtype)} cannot hold (the first is {lost[0]}): "
            "choose fp32 or bf16 (run.save_dtype, or --dtype); if they are not finite in fp32 either, the training "
            "diverged."
        )
    return cast


def _write_folder(path: Path, dialect: ModuleType, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    if path.exists():
        raise InputError(f"{printable(path)} exists already: choose another name, or remove it.")
    configs = {name: text for name, text in entries.items() if name.endswith(f"/{CONFIG}")}
    common = {name: text for name, text in entries.items() if name not in configs}
    with folder_aside(path) as aside:
        for name, text in configs.items():
            prefix = name.removesuffix(CONFIG)
            seal = {DIGEST: sealed(dialect, tensors, entries, prefix=prefix)}
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            (aside / prefix).mkdir()
            (aside / name).write_text(text)
            (aside / prefix / WEIGHTS).write_bytes(safetensors_bytes(own, {**common, **seal}))


def read_adapter(path: Path | str, *, family: Names, assume_alpha: float | None = None) -> AdapterState:
    """The adapter at `path`, a file or a peft folder of any dialect, as a state for `family`.

    `assume_alpha` is the alpha of layers whose file does not say it. Raises InputError for what is no adapter, a
    pickle, a damaged file, and every key that the family has no place for.
    """
    return interpret(read_file(Path(path)), family=family, assume_alpha=assume_alpha)


def interpret(file: AdapterFile, *, family: Names, assume_alpha: float | None = None) -> AdapterState:
    """What `file` means for `family`; see `read_adapter`."""
    if assume_alpha is not None:
        with contextlib.suppress(InputError):
            state = interpret(file, family=family)
            log.warning("%s says all its alphas: none is assumed", printable(file.path))
            return state
    with _named(file.path):
        other = other_kind(file.tensors)
        if other:
            raise InputError(other)
        if problem := unsuited(file.format, family.lora_prefixes):
            raise InputError(problem)
        read: AdapterState = file.dialect.read(file.tensors, file.metadata, family, assume_alpha=assume_alpha)
        return read


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before each problem met within."""
    try:
        yield
    except InputError as error:
        raise InputError([f"{printable(path)}: {problem}" for problem in error.problems]) from None


def read_file(path: Path, *, accept_changed: bool = False) -> AdapterFile:
    """The tensors and metadata at `path`, and their dialect.

    Raises InputError where it is none, and, unless `accept_changed`, where it is not as its digest says.
    """
    path = Path(path)
    tensors, metadata = open_adapter(path)
    kinds = Counter(DTYPE_OF[entry["dtype"]] for entry in tensors.headers.values() if entry["shape"])
    dtype = kinds.most_common(1)[0][0] if kinds else torch.float32
    with _named(path):
        for name in DIALECTS.names():
            if DIALECTS.module(name).recognises(tensors, metadata):
                file = AdapterFile(path, name, dtype, tensors, metadata)
                if not accept_changed and not all(found == said for found, said in digests(file).values()):
                    raise InputError(
                        f"its weights or alphas are not those that were written ({DIGEST} differs): it is damaged, or "
                        "another program changed it. To take it as it is: `lorakit convert --accept-changed`."
                    )
                return file
        other = other_kind(tensors)
        if other:
            raise InputError(other)
        some = ", ".join(printable(key)[:80] for key in sorted(tensors)[:3]) or "none"
        raise InputError(
            f"it is no LoRA file of a known format ({', '.join(DIALECTS.names())}); its keys are: {some} …"
        )


def digests(file: AdapterFile) -> dict[str, tuple[str, str]]:
    """(digest, digest that it says it has), for each file in it that says one, by the beginning of its keys."""
    found = {}
    for entry, said in file.metadata.items():
        if entry.rpartition("/")[2] == DIGEST:
            prefix = entry.removesuffix(DIGEST)
            found[prefix] = (sealed(file.dialect, file.tensors, file.metadata, prefix=prefix), said)
    return found


def sealed(dialect: ModuleType, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, prefix: str = "") -> str:
    """Our digest of the file whose keys here begin with `prefix`, and there go without."""
    keys = sorted(key for key in tensors if key.startswith(prefix))
    alphas = {}
    for key in keys:
        base, ending = split_key(key, dialect.ENDINGS)
        if ending == FIRST:
            rank = tensors[key].shape[0] if tensors[key].ndim else 0
            alphas[base.removeprefix(prefix)] = stored_alpha(dialect, base, rank, tensors, metadata)
    return adapter_digest(((key.removeprefix(prefix), tensors[key]) for key in keys), alphas)
