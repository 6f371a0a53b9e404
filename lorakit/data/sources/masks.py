"""Masks in a folder of their own, for any kind of source: `a/b.png` there is the mask of the picture `a/b.jpg`."""

import os
import stat
from collections.abc import Iterator

from lorakit.core.digests import stamp_of
from lorakit.core.files import printable
from lorakit.core.types import Place
from lorakit.data.sources.beside import Beside
from lorakit.data.sources.items import Found, Item, Storage, make_key


class Masked(Beside):
    """The pictures of `storage` with masks from the folder `path`; links out of that are refused.

    `otherwise` is what is done with a picture that has none.
    """

    key = "mask_path"
    mark = -1

    def __init__(self, storage: Storage, path: str, index: int, *, otherwise: str = "all of it counts") -> None:
        super().__init__(storage, path, index)
        self._otherwise = otherwise

    def items(self, found: Found) -> Iterator[Item]:
        used: set[int] = set()
        without: list[str] = []
        listed = 0
        for item in self._storage.items(found):
            listed += 1
            name = f"{os.path.splitext(item.name)[0]}.png"
            shown = printable(os.path.join(self._shown, name))
            try:
                state = os.stat(os.path.join(self._root, name))
            except OSError:
                without.append(make_key(self._index, item.name))
                yield item
                continue
            used.add(hash(name))
            problems = item.problems
            if item.mask is not None:
                label = self._storage.label(item.name)
                problems = (*problems, f"{label}: it has two masks, one beside it and {shown}: keep one.")
            stamp = stamp_of(state) if stat.S_ISREG(state.st_mode) else ""
            yield item._replace(mask=Place(name, self.mark), mask_stamp=stamp, problems=problems)
        if listed and not used:
            setting = f"data.sources.{self._index}.mask_path = {printable(self._shown)}"
            example = os.path.splitext(without[0].partition("/")[2])[0]
            found.problems.append(f"{setting}: it has a mask for none of the pictures, e.g. no {example}.png.")
            return
        found.warnings += [f"{key}: it has no mask in mask_path, so {self._otherwise}" for key in without]
        for path in _files(self._root):
            if path.lower().endswith(".png") and hash(path) not in used:
                found.of_no_picture(f"mask_path of source {self._index}, {printable(path)}", "a mask")


def _files(root: str) -> Iterator[str]:
    """The files below `root` but for hidden ones, in the order of their names."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        yield from (prefix + name for name in sorted(names) if not name.startswith("."))
