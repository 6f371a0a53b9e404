"""Pictures that an editing model begins with, in a folder of their own, for any kind of source: `a/b.png` or `a/b.webp`
there is that of the picture `a/b.jpg`. Masks in a folder: `masks.py`.
"""

import os
from collections.abc import Iterator

from lorakit.core.digests import stamp_of
from lorakit.core.files import printable
from lorakit.core.types import Place
from lorakit.data.images import suffixes
from lorakit.data.sources.beside import Beside
from lorakit.data.sources.items import Found, Item, make_key


class Paired(Beside):
    """The pictures of `storage`, each with one to begin with from the folder `path`; links out of that are refused.

    A picture without one is a bad picture.
    """

    key = "input_path"
    mark = -2

    def items(self, found: Found) -> Iterator[Item]:
        for item in self._storage.items(found):
            name = self._of(item.name)
            if name is None:
                shown = printable(os.path.join(self._shown, os.path.splitext(item.name)[0]))
                reason = f"it has no picture to begin with in input_path: put one there as {shown}.png"
                found.bad(make_key(self._index, item.name), self.label(item.name), reason)
                continue
            stamp = stamp_of(os.stat(os.path.join(self._root, name)))
            yield item._replace(input=Place(name, self.mark), input_stamp=stamp)

    def _of(self, name: str) -> str | None:
        """The file that belongs to the picture `name`: of its own suffix, or else of another."""
        stem, own = os.path.splitext(name)
        names = (stem + suffix for suffix in (own, *sorted(suffixes())))
        return next((name for name in names if os.path.isfile(os.path.join(self._root, name))), None)
