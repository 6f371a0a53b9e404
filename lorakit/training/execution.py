"""How the backbone is executed: attention's kernel, the layout of convolutions, compiled blocks, checkpoints.

None of it changes what is computed but for rounding, and each is done or refused.
"""

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorakit.core.errors import InputError
from lorakit.core.files import printable

# what diffusers calls it, and transformers, newly and formerly
_CHECKPOINTING = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
Kernel = Literal["auto", "flash", "efficient", "cudnn", "math"]
Attention = Literal["auto", "fastest", "flash", "efficient", "cudnn", "math"]
BACKEND = "inductor"  # torch's own
RECOMPILATIONS = 512  # of a block: each bucket, with and without the adapter; torch's 8 would end in silence
_BLOCKS = 64  # that are alike: torch counts those of all of them too, to 256


@contextlib.contextmanager
def attention(kind: Kernel) -> Iterator[None]:
    """Within it, torch's attention runs in this kernel alone, its backward pass too; "auto": torch chooses.

    Where the kernel cannot be had for a call's shapes, mask and device, the call raises RuntimeError.
    """
    if kind == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(kernels[kind]):
        yield


def use_channels_last(module: nn.Module) -> None:
    """Keeps the weights of convolutions as a GPU reads them fastest; InputError where `module` has too few of them."""
    if not any(isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) for layer in repeated(module)):
        raise InputError("run.channels_last: this model's blocks have no convolutions: leave it out.")
    lay_channels_last(module)


def lay_channels_last(module: nn.Module) -> None:
    """The same, of as many as there are: those of films have weights of another form, and stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compute_again(module: nn.Module, *, share: float) -> None:
    """Makes this share of the blocks of `module` compute their activations again in the backward pass, in place of
    keeping them (Chen et al. 2016, arXiv:1604.06174); of a text encoder all."""
    if share == 1 or not hasattr(module, "enable_gradient_checkpointing"):
        next(getattr(module, name) for name in _CHECKPOINTING if hasattr(module, name))()
        return
    # few weights beside large pictures: much kept for little computing. Of equal blocks the first, which are computed
    # again when what the others kept has gone
    blocks = sorted(checkpointed(module), key=lambda block: sum(weight.numel() for weight in block.parameters()))
    chosen = set(blocks[: max(1, round(share * len(blocks)))])

    def call(block: Any, *args: Any) -> Any:
        again = getattr(block, "func", block) in chosen  # of a partial call
        return checkpoint(block, *args, use_reentrant=False) if again else block(*args)

    module.enable_gradient_checkpointing(call)  # type: ignore[operator]


def checkpointed(module: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers model that it can compute again, each by itself."""
    return [
        block
        for holder in module.modules()
        if hasattr(holder, "gradient_checkpointing")
        for name, blocks in holder.named_children()
        if isinstance(blocks, nn.ModuleList) and not name.endswith("samplers")
        for block in blocks
        if not hasattr(block, "gradient_checkpointing")
    ]


def compile_blocks(module: nn.Module, *, cache: Path | None = None) -> None:
    """Makes torch compile the transformer blocks of `module` when they first run, once for each size of picture.

    What it makes of them it looks for and leaves in the folder `cache`; None: in one that ends with this process.
    """
    # else torch shares a folder in /tmp, of a name that everyone can guess, and reads the pickles that lie there
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private(cache, key="run.compile_cache")) if cache else _passing().name
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILATIONS * _BLOCKS
    for block in blocks_of(module, key="run.compile"):
        block.compile(backend=BACKEND, dynamic=False)


def private(folder: Path, *, key: str) -> Path:
    """`folder`, made if it is not there. Raises InputError, which names the setting `key`, where others may write."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise InputError(
            f"{key} = {printable(folder)} cannot be had ({error.strerror}): name another folder."
        ) from None
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise InputError(
            f"{key} = {printable(folder)}: others may write there, and what lies there is run as code: name a folder "
            "of your own (chmod go-w)."
        )
    return folder


@functools.cache
def _passing() -> "tempfile.TemporaryDirectory[str]":
    """A folder of one's own that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="lorakit-compiled-", ignore_cleanup_errors=True)


def blocks_of(module: nn.Module, *, key: str) -> list[nn.Module]:
    """The transformer blocks that `module` repeats; InputError, which names the setting `key`, where there are none."""
    kinds = set(getattr(module, "_repeated_blocks", None) or ())
    if not kinds:  # not said by every model: blocks that are no part of others, several of a kind
        whole = set(getattr(module, "_no_split_modules", None) or ())
        counted = Counter(type(block).__name__ for block in repeated(module))
        kinds = {kind for kind in whole if counted[kind] > 1}
    blocks = [block for block in module.modules() if type(block).__name__ in kinds]
    if not blocks:
        raise InputError(f"{key}: diffusers names no blocks of this model that repeat: leave it out.")
    return blocks


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """What is within the lists of blocks of `module`."""
    for blocks in module.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                yield from block.modules()


def explained(error: BaseException) -> str | None:
    """What a person can do about an `error` of these, or None."""
    if "No viable backend" in str(error) or "No available kernel" in str(error):
        return "run.attention: torch has no such kernel for this model on this device: choose another, or leave it out."
    if "mixed dtype (CPU)" in str(error):
        return "model.dtype: a CPU does not compute with weights in it at this run.precision: leave it out."
    of_compiler = any("_inductor" in frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    of_code = isinstance(error, AssertionError) and of_compiler  # what it has made does not agree with itself
    if of_code or type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        said = str(error).strip().partition("\n")[0]
        return f"run.compile: torch could not compile this model's blocks here ({said}): leave it out."
    return None
