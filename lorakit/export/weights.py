"""How strong an adapter is where: one number, or numbers for components and blocks of the model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import did_you_mean


@dataclass(frozen=True)
class Weights:
    """`default` for every layer but those under a name in `parts`, like "text_encoder" or "unet.up_blocks.1": there its
    number holds, of several names the longest."""

    default: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.default, *self.parts.values())
        wrong = [f"weight = {number} is no finite number." for number in numbers if not math.isfinite(number)]
        if wrong:
            raise InputError(wrong)

    @classmethod
    def of(cls, given: "float | Mapping[str, float] | Weights") -> "Weights":
        if isinstance(given, Weights):
            return given
        return cls(parts=given) if isinstance(given, Mapping) else cls(float(given))

    @classmethod
    def parsed(cls, text: str) -> "Weights | None":
        """What is written "0.8", "text_encoder=0,unet.up_blocks=1.2" or "0.8,text_encoder=0"; None for another text."""
        default, parts = 1.0, {}
        for i, word in enumerate(text.split(",")):
            name, equals, number = word.strip().rpartition("=")
            try:
                value = float(number)
            except ValueError:
                return None
            if equals:
                parts[name.strip()] = value
            elif i == 0:
                default = value
            else:
                return None
        return cls(default, parts)

    def at(self, layer: str) -> float:
        """The number for the layer "<component>.<path>"."""
        names = [name for name in self.parts if layer == name or layer.startswith(f"{name}.")]
        return self.parts[max(names, key=len)] if names else self.default

    def applied(self, state: AdapterState) -> AdapterState:
        """`state` that strong. Raises InputError for a name under which it has no layer."""
        layers = state.layers()
        known = sorted({name for layer in layers for name in _beginnings(layer)})
        wrong = [
            f"weight {printable(name)} = {number:g}: the adapter has no layer there.{did_you_mean(name, known)}"
            for name, number in self.parts.items()
            if name not in known
        ]
        if wrong:
            raise InputError(wrong)
        return replace(state, alphas={layer: alpha * self.at(layer) for layer, alpha in state.alphas.items()})


def _beginnings(layer: str) -> Iterable[str]:
    words = layer.split(".")
    return (".".join(words[: i + 1]) for i in range(len(words)))
