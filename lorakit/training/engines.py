"""What a launcher asks Accelerate for besides processes: engines that want to own model and optimizer. None is started.

DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) says how memory is shared, and what matters of it for
adapters is kept by our own means: `sharding.py`. All others are refused.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.core.errors import InputError
from lorakit.core.files import printable

_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP: use a configuration without it. run.shard = true shares out the frozen model (FSDP2)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which is not for these models: use a configuration without it",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "other ways of parallelism: use a configuration without them",
}
_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


KEPT = (
    "the launcher asks for DeepSpeed's ZeRO-%d, which is kept without DeepSpeed: from stage 3 on a training shares out "
    "the frozen model (run.shard = true), and what is learnt, with its moments, stays whole in each process; all else "
    "is as the recipe says"
)


@contextlib.contextmanager
def without_engines() -> Iterator[int]:
    """Within it Accelerate starts none of what the launcher asks for; the ZeRO stage of that, to be told by KEPT.

    Raises InputError where something would be passed over in silence.
    """
    asked = [what for name, what in _ENGINES.items() if _is_asked(name)]
    if asked:
        raise InputError([f"The launcher asks for {what}. Ready ones: recipes/accelerate/." for what in asked])
    stage, given = zero_stage(), os.environ.pop(_DEEPSPEED, None)
    try:
        yield stage
    finally:
        if given is not None:  # there may be another training in this process
            os.environ[_DEEPSPEED] = given


def zero_stage() -> int:
    """The ZeRO stage that the launcher asks of DeepSpeed; 0 where it asks for none. Raises InputError for offloading,
    and for a configuration that cannot be read."""
    if not _is_asked(_DEEPSPEED):
        return 0
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    wanted = _of_file(Path(file)) if file != "none" else _of_environment()
    offloaded = [f"{name} = {device}" for name, device in wanted.items() if name != "stage" and device != "none"]
    if offloaded:
        raise InputError(
            f"The launcher's DeepSpeed configuration asks for {' and '.join(offloaded)}, and nothing is offloaded "
            "where a model is shared out: leave it out. Without ZeRO-3, run.offload keeps frozen blocks in the CPU's "
            "memory."
        )
    stage = str(wanted["stage"])
    if stage not in ("0", "1", "2", "3"):
        raise InputError(f"The launcher's DeepSpeed configuration asks for ZeRO stage {printable(stage)}: give 0 to 3.")
    return int(stage)


def _is_asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _of_environment() -> Mapping[str, Any]:
    prefix = "ACCELERATE_DEEPSPEED"  # its defaults are Accelerate's
    return {
        "stage": os.environ.get(f"{prefix}_ZERO_STAGE", "2"),
        "offload_param": os.environ.get(f"{prefix}_OFFLOAD_PARAM_DEVICE", "none"),
        "offload_optimizer": os.environ.get(f"{prefix}_OFFLOAD_OPTIMIZER_DEVICE", "none"),
    }


def _of_file(file: Path) -> Mapping[str, Any]:
    try:
        zero = json.loads(file.read_bytes()).get("zero_optimization", {})
        devices = {name: zero.get(name, {}).get("device", "none") for name in ("offload_param", "offload_optimizer")}
        return {"stage": zero.get("stage", 0), **devices}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"The launcher's DeepSpeed configuration {printable(file)} cannot be read ({printable(error)}): mend it."
        ) from None
