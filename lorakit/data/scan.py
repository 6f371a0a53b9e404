"""Every picture of every source read once before training, and all that is wrong, listed.

Here: which examples there are. Not here: the kinds of sources (`sources/`), what one look at a picture tells
(`inspection.py`), its pixels (`images.py`), its bucket (`buckets.py`). `memo.py` remembers what was looked at.
"""

import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.seeding import hashed
from lorakit.core.types import Example, Place
from lorakit.data import images, similar
from lorakit.data.examples import Examples, ExamplesBuilder
from lorakit.data.inspection import Seen, inspect_mask, inspect_picture
from lorakit.data.memo import Memo
from lorakit.data.sources import Found, Item, SourceSettings, Storage, make_key, open_source

# decoding releases the interpreter's lock; more threads would hold more large pictures in memory
_THREADS = min(4, os.cpu_count() or 1)
_AHEAD = 16 * _THREADS
_ASPECT = 0.01  # how far, in proportion, the aspect of a mask or input picture may be off


@dataclass(frozen=True)
class Scan:
    """What the sources hold; `skipped` are the bad pictures that were left out, with the reason.

    Among the warnings are `unused`, captions and masks of no picture, and `copies`, pictures that are or look like
    others. `storages` are those of the sources that could be opened, by number.

    `warnings` and `skipped` name files by their keys: they may be passed on and hold no absolute path. `problems` name
    them so that a person finds them.
    """

    examples: Examples
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]
    unused: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    storages: Mapping[int, Storage] = field(default_factory=dict)


def scan(
    sources: Sequence[SourceSettings],
    *,
    cache: Path,
    size_problem: Callable[[tuple[int, int]], str | None] = lambda size: None,
    on_bad_image: Literal["error", "skip"] = "error",
    on_progress: Callable[[int], object] | None = None,
) -> Scan:
    """All examples of `sources`, by source and then in its order; nothing wrong in the data is raised.

    `size_problem` says of an upright picture's (width, height) why it cannot be used, if so. With `on_bad_image` "skip"
    what is no usable picture is left out and named. `cache` is the folder where it is remembered what was looked at.
    `on_progress` is called with 1 after each picture.
    """
    found = Found(skip=on_bad_image == "skip")
    if not sources:
        found.problems.append("data.sources is empty: name a folder of pictures, e.g. data.sources.0.path=photos")
    inside = _lies_within(cache, sources)
    memo = Memo(None if inside else cache / "scan.sqlite")
    builder = ExamplesBuilder()
    storages: dict[int, Storage] = {}
    try:
        for index, settings in enumerate(sources):
            if settings.generate is not None and not os.path.lexists(settings.path):
                continue  # nothing is drawn yet
            try:
                storage = open_source(settings, index, cache=cache)
            except InputError as error:
                found.problems += error.problems
                continue
            if inside and getattr(storage, "writes", False):
                found.problems.append(
                    f"data.cache = {printable(cache)} lies among a source's pictures, where nothing is ever written: "
                    "choose another folder."
                )
                continue
            storages[index] = storage
            source = _Source(settings, index, storage, memo, found, builder, size_problem)
            for _ in source.scan():
                if on_progress is not None:
                    on_progress(1)
    finally:
        memo.close()
    if memo.warning is not None:
        found.warnings.append(memo.warning)
    examples = builder.build()
    copies = tuple(_copies(examples))
    # a text file that two pictures share is wrong for both
    return Scan(
        examples,
        problems=tuple(dict.fromkeys(found.problems)),
        warnings=(*found.warnings, *copies),
        skipped=tuple(found.skipped),
        unused=tuple(found.unused),
        copies=copies,
        storages=storages,
    )


class _Looked(NamedTuple):
    """What came of looking at an item: what is known of picture, mask and input, or what is wrong with them."""

    picture: Seen | str
    mask: Seen | str | None = None
    input: Seen | str | None = None


@dataclass
class _Source:
    """One source in the course of its scan."""

    settings: SourceSettings
    index: int
    storage: Storage
    memo: Memo
    found: Found
    builder: ExamplesBuilder
    size_problem: Callable[[tuple[int, int]], str | None]
    began: int = field(default_factory=time.time_ns)
    names: "array[int]" = field(default_factory=lambda: array("q"))
    usable: int = 0

    def scan(self) -> Iterator[None]:
        """Adds the source's examples, and what is wrong with them; yields after each picture."""
        root, said = self.storage.identity, len(self.found.problems)
        waiting: deque[tuple[Item, _Looked | Future[_Looked]]] = deque()
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for item in self.storage.items(self.found):
                if item.mask is not None and self.settings.mask != "auto":
                    key, setting = make_key(self.index, item.name), f'mask = "{self.settings.mask}"'
                    self.found.warnings.append(f"{key}: its mask picture is not used, for the source has {setting}")
                    item = item._replace(mask=None)
                picture = self.memo.get(root, item.place, item.stamp)
                mask = item.mask and self.memo.get(root, item.mask, item.mask_stamp, kind="mask")
                given = item.input and self.memo.get(root, item.input, item.input_stamp, kind="input")
                beside = (item.mask is None or mask is not None) and (item.input is None or given is not None)
                if picture is not None and beside:
                    waiting.append((item, _Looked(picture, mask, given)))
                else:
                    waiting.append((item, pool.submit(_look, self.storage, item, picture, mask, given)))
                while waiting and (len(waiting) > _AHEAD or _is_ready(waiting[0][1])):
                    self._finish(*waiting.popleft())
                    yield
            while waiting:
                self._finish(*waiting.popleft())
                yield
        finally:
            pool.shutdown(cancel_futures=True)
        self._whole(said)

    def _finish(self, item: Item, looked: "_Looked | Future[_Looked]") -> None:
        if isinstance(looked, Future):
            looked = looked.result()
            self._remember(item, looked)
        key, label = make_key(self.index, item.name), self.storage.label(item.name)
        self.names.append(hashed(item.name))
        problem = looked.picture if isinstance(looked.picture, str) else self.size_problem(looked.picture.size)
        for what, beside in (("mask", looked.mask), ("input picture", looked.input)):
            if problem is None and isinstance(beside, str):
                problem = f"its {what}: {beside}"
            if problem is None and isinstance(beside, Seen) and isinstance(looked.picture, Seen):
                problem = _shape_problem(what, beside.size, looked.picture.size)
        if problem is not None:
            self.found.bad(key, label, problem)
            return
        self.usable += 1
        assert isinstance(looked.picture, Seen)
        assert not isinstance(looked.mask, str) and not isinstance(looked.input, str)
        focus = looked.mask.focus if looked.mask else None
        try:
            focus = _middle(item.box, looked.picture.size) if item.box else focus
            captions = self._captions(item)
        except ValueError as error:
            self.found.problems += [*item.problems] or [f"{label}: {error}."]
            return
        if item.problems:
            self.found.problems += item.problems
            return
        mask, mask_digest = item.mask, looked.mask.digest if looked.mask else ""
        if self.settings.mask == "alpha" and looked.picture.alpha:
            mask, mask_digest = item.place, looked.picture.digest
        elif self.settings.mask == "alpha":
            self.found.warnings.append(f'{key}: nothing of it is transparent, so with mask = "alpha" all of it counts')
        self.builder.add(
            Example(
                key,
                self.index,
                item.place,
                captions,
                looked.picture.size,
                looked.picture.digest,
                role=self.settings.role,
                mask=mask,
                mask_digest=mask_digest,
                focus=focus,
                look=looked.picture.look,
                input=item.input,
                input_digest=looked.input.digest if looked.input else "",
            )
        )

    def _captions(self, item: Item) -> tuple[str, ...]:
        captions = tuple(text for text in item.captions if text) or ((self.settings.default_caption or "").strip(),)
        if any(captions) or self.settings.allow_missing_captions:
            return captions
        raise ValueError(
            f"{'its caption is empty' if item.captions else 'it has no caption'}: "
            f"{self.storage.caption_advice(item.name)}, or give the source a default_caption, "
            "or set allow_missing_captions"
        )

    def _remember(self, item: Item, looked: _Looked) -> None:
        root = self.storage.identity
        if isinstance(looked.picture, Seen):
            self.memo.put(root, item.place, item.stamp, looked.picture, began=self.began)
        if isinstance(looked.mask, Seen) and item.mask is not None:
            self.memo.put(root, item.mask, item.mask_stamp, looked.mask, began=self.began, kind="mask")
        if isinstance(looked.input, Seen) and item.input is not None:
            self.memo.put(root, item.input, item.input_stamp, looked.input, began=self.began, kind="input")

    def _whole(self, said: int) -> None:
        """What can only be said at the end: no pictures at all, or two of one name."""
        listed, problems = len(self.names), self.found.problems
        setting = f"data.sources.{self.index}.path = {printable(self.settings.path)}"
        drawn = self.settings.generate is not None  # or to be drawn
        if not self.usable and (self.found.skip or not listed) and not drawn and len(problems) == said:
            suffixes = " ".join(sorted(images.suffixes()))
            what = "none of its pictures can be used" if listed else f"it holds no pictures ({suffixes})"
            problems.append(f"{setting}: {what}.")
        numbers = np.frombuffer(self.names, dtype=np.int64)
        twice, counts = np.unique(numbers, return_counts=True)
        if (counts > 1).any():
            wrong = set(twice[counts > 1].tolist())
            names = dict.fromkeys(item.name for item in self.storage.items(Found()) if hashed(item.name) in wrong)
            for name in names:
                problems.append(f"{self.storage.label(name)}: there are two pictures of this name: keep or rename one.")


def _is_ready(looked: "_Looked | Future[_Looked]") -> bool:
    return not isinstance(looked, Future) or looked.done()


def _look(storage: Storage, item: Item, picture: Seen | None, mask: Seen | None, given: Seen | None) -> _Looked:
    """Looks at what of an item is not known yet."""
    return _Looked(
        picture or _try(storage, item.place, inspect_picture),
        item.mask and (mask or _try(storage, item.mask, inspect_mask)),
        item.input and (given or _try(storage, item.input, inspect_picture)),
    )


def _try(storage: Storage, place: Place, inspect: Callable[[bytes], Seen]) -> Seen | str:
    try:
        return inspect(storage.read(place))
    except ValueError as error:
        return printable(error)
    except OSError as error:
        return f"it could not be read ({error.strerror or printable(error)}): check the disk and the file's permissions"
    except MemoryError:
        return "there is not enough memory to read it: make it smaller"


def _shape_problem(what: str, other: tuple[int, int], size: tuple[int, int]) -> str | None:
    """What is wrong with a mask or input picture of this size, if its shape is another than its picture's."""
    off = abs(other[0] * size[1] - other[1] * size[0])
    # the sides of a smaller one were rounded, each by half a pixel at most
    rounding = (size[0] + size[1]) / 2 if other[0] < size[0] else 0.0
    if off <= _ASPECT * other[1] * size[0] + rounding:
        return None
    return f"its {what} is {other[0]}×{other[1]} and it is {size[0]}×{size[1]}: make the {what} of the same shape"


def _middle(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float]:
    """The middle of a box, in 0 … 1 of the picture; ValueError if it lies outside."""
    left, top, right, bottom = box
    width, height = size
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise ValueError(f"its box {list(box)} lies outside its {width}×{height} pixels: correct it")
    left, right = max(left, 0.0), min(right, float(width))
    top, bottom = max(top, 0.0), min(bottom, float(height))
    return (left + right) / 2 / width, (top + bottom) / 2 / height


def _lies_within(cache: Path, sources: Sequence[SourceSettings]) -> bool:
    """Whether the cache lies among somebody's pictures, where nothing is ever written."""
    real = os.path.realpath(cache)
    roots = [os.path.realpath(s.path) for s in sources if "\0" not in s.path and not s.path.startswith("hf://")]
    return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)


def _copies(examples: Examples) -> Iterator[str]:
    """Says of each picture that is or looks like an earlier one which that is."""
    words = np.ascontiguousarray(examples.digests).view("V32").reshape(-1)
    _, first, of = np.unique(words, return_index=True, return_inverse=True)
    first = first[of]
    same = np.flatnonzero(first != np.arange(len(first))).tolist()
    said = {i: f"{examples.keys[i]}: the same file as {examples.keys[int(first[i])]}" for i in same}
    looks = examples.looks.copy()
    looks[same] = 0  # said already
    for later, earlier in similar.alike(looks):
        said[later] = f"{examples.keys[later]}: looks like {examples.keys[earlier]}"
    yield from (said[i] for i in sorted(said))
