"""Tags by a tagger in the manner of WD14: `model.onnx` gives each tag in `selected_tags.csv` a score from 0 to 1.

The picture is put on a white square and handed over as blue, green, red from 0 to 255.
"""

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from lorakit.captioning.models import TAGGER, TAGS, resolve
from lorakit.captioning.pictures import Picture, looked_at
from lorakit.captioning.protocol import WriterSettings
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Settings as Table

# Danbooru's numbers of its categories, which the file has; those without a name here are left out
_CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
_FILES = [TAGGER, TAGS]
_MARGIN = 4  # a picture is decoded at up to so many times the tagger's side, before it is made to it


class Thresholds(Table):
    """The score above which a tag counts, for each category of tags; 1 leaves them all out."""

    general: float = Field(default=0.35, ge=0.0, le=1.0)
    """What is to be seen."""

    character: float = Field(default=0.85, ge=0.0, le=1.0)
    """Who."""

    copyright: float = Field(default=1.0, ge=0.0, le=1.0)
    """From which work."""

    artist: float = Field(default=1.0, ge=0.0, le=1.0)
    """By whom."""

    meta: float = Field(default=1.0, ge=0.0, le=1.0)
    """About the file."""

    rating: float = Field(default=1.0, ge=0.0, le=1.0)
    """How fit for whom; of these the likeliest alone."""


class Settings(WriterSettings):
    """A model that knows some thousand tags."""

    kind: Literal["tagger"]

    model: str
    """A folder with `model.onnx` and `selected_tags.csv`, or a hub name."""

    thresholds: Thresholds = Field(default_factory=Thresholds)
    """The score above which a tag counts, for each category of tags."""

    exclude: list[str] = Field(default_factory=list)
    """Patterns (*, ?) of tags that are left out."""

    rename: dict[str, str] = Field(default_factory=dict)
    """What tags become; an underscore is a blank here too."""

    underscores: bool = False
    """Whether underscores stay. Else they become blanks, but in faces like `>_<`."""

    order: Literal["score", "alphabet", "model"] = "score"
    """The likeliest first, by letters, or as in `selected_tags.csv`."""

    first: list[str] = Field(default_factory=list)
    """Patterns (*, ?) of tags that stand before all others, in the order of these."""

    max_tags: int | None = Field(default=None, ge=1)
    """How many of the likeliest at most; absent: all."""

    batch_size: int = Field(default=8, ge=1)
    """How many pictures are looked at together, on each process."""


class Tag(NamedTuple):
    name: str
    category: str


def check(settings: Settings) -> None:
    """Raises InputError where the folder holds no tagger, or what runs it is not installed."""
    folder, problems = resolve(settings.model, files=_FILES), []
    where = f"model = {printable(settings.model)}"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        problems.append(f"{where} lacks {' and '.join(missing)}: a tagger has both.")
    if importlib.util.find_spec("onnxruntime") is None:
        problems.append(f'{where} is run by onnxruntime, which is not installed: pip install "lorakit[tagger]".')
    if problems:
        raise InputError(problems)


def load(settings: Settings, *, root: Path, device: Any) -> "Tagger":
    """Raises InputError where onnxruntime does not load the model, or its tags are others'."""
    import onnxruntime

    folder = resolve(settings.model, files=_FILES)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(str(folder / TAGGER), providers=providers)
    except Exception as error:  # its classes are those of a C++ library, without a common base
        raise InputError(f"{printable(folder / TAGGER)} could not be loaded: {printable(error)[:300]}") from error
    return Tagger(session, read_tags(folder / TAGS), settings)


def read_tags(file: Path) -> list[Tag]:
    """The tags in the order of the model's scores. InputError where the file is no such table."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            return [Tag(row["name"], _CATEGORIES.get(row["category"], "")) for row in csv.DictReader(opened)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise InputError(f"{printable(file)} is no table with columns name and category ({error!r}).") from None


class Tagger:
    """Lets `session` (of onnxruntime, or like it) score `tags`. InputError where they do not belong together."""

    def __init__(self, session: Any, tags: Sequence[Tag], settings: Settings) -> None:
        self._session, self._tags, self._settings = session, tags, settings
        self._input = session.get_inputs()[0]
        batch, *self._shape = self._input.shape
        scores = session.get_outputs()[0].shape[-1]
        where = f"model = {printable(settings.model)}"
        if len(self._shape) != 3 or self._shape[0] != self._shape[1] or self._shape[2] != 3:
            raise InputError(f"{where} takes {self._input.shape} and no (pictures, side, side, 3), as taggers do here.")
        if isinstance(scores, int) and scores != len(tags):
            raise InputError(
                f"{where} gives {scores} scores, and {TAGS} has {len(tags)} tags: they do not belong together."
            )
        self.batch_size = batch if isinstance(batch, int) else settings.batch_size

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        return looked_at(pictures, self._tagged, longest=_MARGIN * self._shape[0])

    def _tagged(self, images: list[Image.Image]) -> list[tuple[str, ...]]:
        pixels = np.stack([_square(image, self._shape[0]) for image in images])
        found: NDArray[np.float32] = self._session.run(None, {self._input.name: pixels})[0]
        return [(", ".join(chosen(self._tags, scores.tolist(), self._settings)),) for scores in found]


def chosen(tags: Sequence[Tag], scores: Sequence[float], settings: Settings) -> list[str]:
    """The tags with the highest scores as they are written, in their order."""
    ranked = sorted(range(len(tags)), key=lambda i: -scores[i])
    ratings = [i for i in ranked if tags[i].category == "rating"][1:]
    least: Mapping[str, float] = settings.thresholds.model_dump()
    kept = [i for i in ranked if scores[i] > least.get(tags[i].category, 1.0) and i not in ratings]
    kept = [i for i in kept if not any(_matches(tags[i].name, pattern) for pattern in settings.exclude)]
    kept = kept[: settings.max_tags]
    if settings.order != "score":
        kept.sort(key=lambda i: tags[i].name.lower() if settings.order == "alphabet" else i)
    last = len(settings.first)
    ahead = {i: next((n for n, p in enumerate(settings.first) if _matches(tags[i].name, p)), last) for i in kept}
    kept.sort(key=lambda i: ahead[i])
    names = {_plain(old): new for old, new in settings.rename.items()}
    written = [names.get(_plain(tags[i].name)) or _written(tags[i].name, settings) for i in kept]
    return list(dict.fromkeys(written))


def _matches(tag: str, pattern: str) -> bool:
    return fnmatchcase(_plain(tag), _plain(pattern))


def _plain(tag: str) -> str:
    return tag.strip().lower().replace("_", " ")


def _written(tag: str, settings: Settings) -> str:
    # in a face nothing between underscores is a word
    is_face = all(sum(c.isalnum() for c in part) < 2 for part in tag.split("_"))
    return tag if settings.underscores or is_face else tag.replace("_", " ")


def _square(image: Image.Image, side: int) -> NDArray[np.float32]:
    """The picture in the middle of a white square, (side, side, 3) as blue, green, red."""
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), "white")
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    resized = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.float32)[:, :, ::-1])
