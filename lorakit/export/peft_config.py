"""The entries of a peft LoRA configuration that say how strong each layer is: written and read, without peft.

Only what peft needs is written: a key that another version does not know is an error there.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lorakit.adapters.state import FIRST, AdapterState
from lorakit.core.errors import InputError
from lorakit.core.files import printable

# what a configuration may say beside ranks and alphas without changing the meaning of A and B
_DIFFERENT = ("use_dora", "lora_bias", "modules_to_save", "megatron_config", "layer_replication", "target_parameters")


def config_of(state: AdapterState, component: str, *, anchored: bool = True) -> dict[str, Any]:
    """Ranks and alphas of the component's layers: the commonest as `r` and `lora_alpha`, the others as patterns.

    A pattern is a regular expression that peft lets match the end of a name; `anchored` pins it to the whole.
    """
    prefix = f"{component}."
    ranks = {n.removeprefix(prefix): len(state.tensors[n + FIRST]) for n in state.layers() if n.startswith(prefix)}
    alphas = {path: _plain(state.alphas[prefix + path]) for path in ranks}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    start = "^" if anchored else ""
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {start + path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {start + path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha.is_integer() else alpha


@functools.lru_cache(maxsize=8)
def parsed(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`; InputError where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object: the file is damaged.")
    return value


def alpha_from(config: Mapping[str, Any], path: str, rank: int) -> float | None:
    """The effective alpha that `config` gives to the layer at `path`; None where it does not say.

    Raises InputError for a configuration whose matrices mean something else than a LoRA's (DoRA, biases), and for
    patterns that are more than names.
    """
    different = [key for key in _DIFFERENT if config.get(key)]
    different += ["bias"] if config.get("bias", "none") != "none" else []
    different += ["peft_type"] if str(config.get("peft_type") or "LORA").rpartition(".")[2] != "LORA" else []
    if different:
        raise InputError(f"its peft configuration sets {', '.join(different)}, which this version cannot load.")
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        name = str(pattern).lstrip("^").replace("\\.", ".")
        if any(c in name for c in "*+?()[]{}|$\\"):
            raise InputError(f"its peft configuration has a pattern that is no plain name: {printable(pattern)}.")
        if path == name or path.endswith(f".{name}"):
            alpha = value
            break
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"its peft configuration gives {printable(path)} the alpha {printable(alpha)}, no number.")
    return float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
