"""Which layers of a module are adapted, and how each: by presets and endings, within blocks, refined by patterns.

Layers are known by dotted names and the shapes of their weights alone, so that the same rule serves a model and the
headers of its files. Putting the adapters in is the kinds' affair (lora.py).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lorakit.core import settings as core_settings
from lorakit.core.files import printable
from lorakit.core.settings import did_you_mean

Shape = tuple[int, ...]
T = TypeVar("T")

# the modules that diffusers and transformers call so; the way out of FLUX's single blocks is that of both
_ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|attention|SelfAttention)\.")
_MLP = re.compile(
    r"(^|\.)(ff\w*|\w*mlp\w*|feed_forward|DenseReluDense)(\.|$)|(^|\.)single_transformer_blocks\.\d+\.proj_out$"
)
# "model.layers.embed_tokens", "shared": tables, which have the shape of a linear layer's weight
_TABLE = re.compile(r"(^|\.)(\w*embedding|embed_tokens|shared)$")

PRESETS: dict[str, Callable[[str, Shape], bool]] = {
    "attention": lambda name, shape: bool(_ATTENTION.search(name)),
    "attention+mlp": lambda name, shape: bool(_ATTENTION.search(name) or _MLP.search(name)),
    "all-linear": lambda name, shape: len(shape) == 2,
    "all+conv": lambda name, shape: True,
}


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{printable(text)!r} is no regular expression ({error})") from None
    return text


class PatternSettings(core_settings.Settings):
    match: Annotated[str, AfterValidator(_expression)] = Field(min_length=1)
    """A regular expression, found anywhere in a layer's dotted name: "attn2", "up_blocks.*to_v$"."""
    rank: int | None = Field(None, ge=0)
    """The rank of these layers; 0: they are left out. Left out: as the others'."""
    alpha: float | None = Field(None, gt=0)
    """Their alpha. Left out: as the others', which is their own rank where no other is given."""
    lr: float | None = Field(None, gt=0)
    """Their learning rate, lr_… in metrics.jsonl. Left out: as the others'."""

    @model_validator(mode="after")
    def _says_something(self) -> "PatternSettings":
        others = [name for name in ("alpha", "lr") if getattr(self, name) is not None]
        if self.rank is None and not others:
            raise ValueError("a pattern says nothing without a rank, alpha or lr: give one, or remove it")
        if self.rank == 0 and others:
            raise ValueError(f"rank = 0 leaves these layers out, so {others[0]} says nothing: remove one of them")
        return self

    @property
    def name(self) -> str:
        """What its rate is called: "up_blocks.*attn2" is up_blocks_attn2."""
        return re.sub(r"\W+|_+", "_", self.match).strip("_") or "pattern"


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Listed = Annotated[T, BeforeValidator(_listed)]


class Part(Protocol):
    """What settings of an adapter say about layers."""

    @property
    def rank(self) -> int: ...
    @property
    def blocks(self) -> list[str] | None: ...
    @property
    def patterns(self) -> list[PatternSettings]: ...


def pattern_of(part: Part, name: str) -> int | None:
    """The index of the pattern that counts for the layer: the last that matches."""
    return next((i for i in reversed(range(len(part.patterns))) if re.search(part.patterns[i].match, name)), None)


@dataclass(frozen=True)
class Chosen:
    """The adapted layers with their ranks, in the order of the module, and what is wrong with the choice."""

    ranks: dict[str, int]
    problems: list[str]


def choose(
    shapes: Mapping[str, Shape], part: Part, targets: Sequence[str], *, where: str, grouped: Iterable[str] = ()
) -> Chosen:
    """Which layers `targets` name within `part.blocks`, and the ranks that they have by `part.patterns`.

    `shapes` are those of the weights by layer, `grouped` convolutions among them that cannot be adapted; `where` is the
    settings' key in messages.
    """
    shapes = {name: shape for name, shape in shapes.items() if len(shape) in (2, 4) and not _TABLE.search(name)}
    grouped = set(grouped)
    problems: list[str] = []
    named: set[str] = set()
    for target in targets:
        preset = PRESETS.get(target)
        found = {n for n, shape in shapes.items() if (preset(n, shape) if preset else _ends(n, target))}
        if not found:
            what = "is of the preset" if preset else "has a name that ends in"
            hint = did_you_mean(target, [*PRESETS, *_endings(shapes)])
            problems.append(f"{where}.targets: no linear or convolution layer {what} {printable(target)!r}.{hint}")
        elif not preset and found & grouped:
            some = min(found & grouped)
            problems.append(f"{where}.targets: {target!r} names grouped convolutions ({some}): leave it out.")
        named |= found - grouped
    if part.blocks is not None:
        named, wrong = _within(named, part.blocks, shapes, where=where)
        problems += wrong
    taken = {name: pattern_of(part, name) for name in shapes if name in named}
    if named:
        problems += _idle(part, taken, shapes, where=where)
    ranks = {n: part.rank if i is None or (own := part.patterns[i].rank) is None else own for n, i in taken.items()}
    if named and not any(ranks.values()):
        problems.append(f"{where}.patterns leave all layers out: give some of them a rank.")
    if not problems:
        problems = _too_high(part, ranks, taken, shapes, where=where)
    return Chosen({name: rank for name, rank in ranks.items() if rank}, problems)


def _ends(name: str, target: str) -> bool:
    return re.search(rf"(^|\.){re.escape(target).replace(re.escape('*'), '[0-9]+')}$", name) is not None


def _within(
    named: set[str], blocks: Sequence[str], shapes: Mapping[str, Shape], *, where: str
) -> tuple[set[str], list[str]]:
    """The layers in `blocks` ("up_blocks.0-1": some names in a row, where a number may be a range)."""
    inside: set[str] = set()
    problems = []
    for block in blocks:
        parts = [_alternatives(part) for part in block.split(".")]
        expression = re.compile(r"(^|\.)" + r"\.".join(parts) + r"\.")
        found = {name for name in shapes if expression.search(name)}
        if not found:
            hint = did_you_mean(block, sorted({m.group() for n in shapes for m in re.finditer(r"\w+\.\d+(?=\.)", n)}))
            problems.append(f"{where}.blocks: no layer lies in {printable(block)!r}.{hint}")
        elif not found & named and named:
            problems.append(f"{where}.blocks: no layer in {block!r} is one of {where}.targets: remove it.")
        inside |= found
    return named & inside, problems


def _alternatives(part: str) -> str:
    """A name's part as an expression; "4-11" is any of these numbers."""
    ends = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part)
    if not ends:
        return re.escape(part)
    return f"({'|'.join(map(str, range(int(ends[1]), int(ends[2]) + 1))) or '(?!)'})"


def _idle(part: Part, taken: Mapping[str, int | None], shapes: Mapping[str, Shape], *, where: str) -> list[str]:
    """What is wrong with patterns that count for no layer."""
    problems = []
    for i, pattern in enumerate(part.patterns):
        if i in taken.values():
            continue
        key, shown = f"{where}.patterns.{i}.match", printable(pattern.match)
        found = [name for name in shapes if re.search(pattern.match, name)]
        if set(found) & taken.keys():
            problems.append(
                f"{key} = {shown!r}: the last pattern that matches counts, and later ones match all of these."
            )
        elif found:
            some = f"{len(found)} layers, like {found[0]}"
            problems.append(
                f"{key} = {shown!r} matches {some}, and {where}.targets names none of them: add them there."
            )
        else:
            parts = sorted({part for name in shapes for part in name.split(".") if not part.isdigit()})
            unknown = [word for word in re.findall(r"[a-z]\w*", pattern.match) if not any(word in p for p in parts)]
            hint = did_you_mean(unknown[0] if unknown else pattern.match, parts)
            problems.append(f"{key} = {shown!r} matches no layer's name.{hint}")
    return problems


def _too_high(
    part: Part, ranks: Mapping[str, int], taken: Mapping[str, int | None], shapes: Mapping[str, Shape], *, where: str
) -> list[str]:
    """Ranks that are more than any of the layers that they are for has."""
    layers: dict[str, list[str]] = {}
    for name, i in taken.items():
        own = i is not None and part.patterns[i].rank is not None
        layers.setdefault(f"{where}.patterns.{i}.rank" if own else f"{where}.rank", []).append(name)
    most = {key: max(min(shapes[n][0], math.prod(shapes[n][1:])) for n in names) for key, names in layers.items()}
    return [
        f"{key} = {ranks[names[0]]} is more than any of its layers has (at most {most[key]}): lower it."
        for key, names in layers.items()
        if ranks[names[0]] > most[key]
    ]


def _endings(names: Iterable[str]) -> list[str]:
    """The shortest endings that say something: a number is told with the word before it (`to_out.0`)."""
    words = (re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name) for name in names)
    return sorted({word.group() for word in words if word})
