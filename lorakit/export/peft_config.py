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
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{what} is not a JSON object: the file is damaged.")
    return value


@functools.lru_cache(maxsize=16)
def read_config(text: str, what: str, *, component: str = "") -> "Config":
    """The configuration in `text`; of an object of several, that of `component`, whose keys begin with its name.

    Raises InputError for one whose matrices mean something else than a LoRA's (DoRA, biases).
    """
    config = parsed(text, what)
    if component:
        start = f"{component}."
        config = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
    different = [key for key in _DIFFERENT if config.get(key)]
    different += ["bias"] if config.get("bias", "none") != "none" else []
    different += ["peft_type"] if str(config.get("peft_type") or "LORA").rpartition(".")[2] != "LORA" else []
    if different:
        raise InputError(
            f"{what} sets {', '.join(different)}, which makes another adapter of the matrices than a LoRA: fold it "
            "into its base with peft (merge_and_unload), or train without."
        )
    return Config(config, what)


class Config:
    """Rank and alpha that a peft configuration gives to each layer; `what` names it in messages."""

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self._what, self._rslora = what, bool(values.get("use_rslora"))
        self._rank, self._alpha = (self._number(values.get(key), key) for key in ("r", "lora_alpha"))
        self._ranks, self._alphas = (self._patterns(values.get(key), key) for key in ("rank_pattern", "alpha_pattern"))

    def alpha(self, path: str, rank: int) -> float | None:
        """The effective alpha of the layer at `path`, whose matrices have this rank; None where it does not say.

        Raises InputError where the configuration gives it another rank: peft would scale by that one.
        """
        said = _matching(self._ranks, path, self._rank)
        if said is not None and said != rank:
            raise InputError(
                f"{self._what} gives {printable(path)} the rank {said:g}, its matrices have {rank}: one of them is of "
                "another adapter."
            )
        alpha = _matching(self._alphas, path, self._alpha)
        return alpha if alpha is None or not self._rslora else alpha * math.sqrt(rank)

    def _patterns(self, patterns: Any, key: str) -> dict[str, tuple[int, float]]:
        """Place and number of each name in a pattern's list, of which peft takes the first that matches."""
        if not isinstance(patterns or {}, dict):
            raise InputError(f"{self._what} has a {key} that is no table: the file is damaged.")
        found: dict[str, tuple[int, float]] = {}
        for i, (pattern, value) in enumerate((patterns or {}).items()):
            name = pattern.replace("\\.", ".")
            if any(c in name.removeprefix("^") for c in "^*+?()[]{}|$\\"):
                raise InputError(f"{self._what} has a pattern that is no plain name: {printable(pattern)}.")
            number = self._number(value, f"{key} of {printable(pattern)}")
            if number is not None:
                found.setdefault(name, (i, number))
        return found

    def _number(self, value: Any, key: str) -> float | None:
        try:
            if value is None or (not isinstance(value, bool) and math.isfinite(value)):
                return None if value is None else float(value)
        except (TypeError, OverflowError):
            pass
        raise InputError(f"{self._what} gives as {key} {printable(value)[:80]}, which is no number.")


def _matching(patterns: Mapping[str, tuple[int, float]], path: str, default: float | None) -> float | None:
    """The number of the first pattern that names `path`, or, where it is not pinned to the whole, its end."""
    words = path.split(".")
    names = (f"^{path}", *(".".join(words[i:]) for i in range(len(words)))) if patterns else ()
    found = [patterns[name] for name in names if name in patterns]
    return min(found)[1] if found else default
