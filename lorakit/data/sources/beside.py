"""Files in a folder of their own that belong to pictures by their names: what masks.py and inputs.py share."""

import os

from lorakit.core.types import Place
from lorakit.data.sources.items import MAX_PICTURE_BYTES, Storage, read_regular


class Beside:
    """The pictures of `storage`, and files of theirs in the folder `path`, which the setting `key` names; links out of
    that are refused. Places that start at `mark` are in the folder.
    """

    key: str
    mark: int

    def __init__(self, storage: Storage, path: str, index: int) -> None:
        self._storage = storage
        self._shown = path
        self._root = os.path.realpath(path)
        self._index = index
        self.writes = bool(getattr(storage, "writes", False))

    @property
    def identity(self) -> str:
        # places in the folder are no others' places
        return f"{self._storage.identity}\0{self._root}"

    def label(self, name: str) -> str:
        return self._storage.label(name)

    def caption_advice(self, name: str) -> str:
        return self._storage.caption_advice(name)

    def read(self, place: Place) -> bytes:
        if place.start != self.mark:
            return self._storage.read(place)
        path = os.path.join(self._root, place.file)
        if not os.path.realpath(path).startswith(self._root.rstrip("/") + "/"):
            raise ValueError(f"it is a link out of {self.key}: put the file itself there")
        return read_regular(path, MAX_PICTURE_BYTES)
