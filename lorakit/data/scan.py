"""Every picture of every source read once before training, and all that is wrong, listed.

Here: which examples there are. Not here: the kinds of sources (`sources/`), a picture's pixels (`images.py`), its bucket
(`buckets.py`). What was looked at is remembered by `memo.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.data.examples import Examples
from lorakit.data.sources import SourceSettings


@dataclass(frozen=True)
class Scan:
    """What the sources hold; `skipped` are the bad pictures that were left out, with the reason.

    `warnings` and `skipped` name files by their keys: they may be passed on and hold no absolute path. `problems` name
    them so that a person finds them.
    """

    examples: Examples
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]


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
    `on_progress` is called with the number of pictures done, after each.
    """
    raise NotImplementedError
