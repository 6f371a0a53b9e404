"""What was learnt of pictures in earlier scans, so that one that has not changed is neither read nor decoded again.

An SQLite file beside the cache. It is a convenience: where it cannot be used the scan goes on without it, and says so.
"""

import hashlib
import sqlite3
from pathlib import Path

from lorakit.core.digests import RACY_NS, changed_at
from lorakit.core.errors import StorageError
from lorakit.core.files import make_folder, printable
from lorakit.core.types import Place
from lorakit.data.inspection import Seen
from lorakit.data.similar import LOOK_BYTES

VERSION = 4
"""Of what is looked at in a picture; entries of other versions count for nothing."""

_FLUSH = 1000  # a killed scan loses as many
_WAIT_S = 5.0  # for another process's write

_TABLE = """CREATE TABLE IF NOT EXISTS pictures (
    key BLOB PRIMARY KEY, stamp TEXT NOT NULL, version INTEGER NOT NULL, digest BLOB NOT NULL, width INTEGER NOT NULL,
    height INTEGER NOT NULL, look BLOB NOT NULL, alpha INTEGER NOT NULL, x REAL, y REAL) WITHOUT ROWID"""


class Memo:
    """Remembers pictures of `root`s by place and stamp; to be used by one thread, and closed.

    After an error of SQLite, whichever, it knows nothing any more and `warning` says so.
    """

    def __init__(self, path: Path | None) -> None:
        self.warning: str | None = None
        self._base: sqlite3.Connection | None = None
        self._waiting: list[tuple[object, ...]] = []
        if path is None:
            return
        try:
            make_folder(path.parent)
            self._base = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
            self._base.execute(_TABLE)
        except (sqlite3.Error, StorageError, OSError) as error:
            self._give_up(error)

    def get(self, root: str, place: Place, stamp: str, *, kind: str = "picture") -> Seen | None:
        """What was learnt of the bytes with this stamp, if anything."""
        if self._base is None or not stamp:
            return None
        try:
            row = self._base.execute(
                "SELECT digest, width, height, look, alpha, x, y FROM pictures "
                "WHERE key = ? AND stamp = ? AND version = ?",
                (_key(root, place, kind), stamp, VERSION),
            ).fetchone()
            if row is None:
                return None
            digest, width, height, look, alpha, x, y = row
            focus = None if x is None or y is None else (float(x), float(y))
            size = int(width), int(height)
            return Seen(bytes(digest).hex(), size, int.from_bytes(look, "big"), bool(alpha), focus)
        except (sqlite3.Error, TypeError, ValueError) as error:
            self._give_up(error)
            return None

    def put(self, root: str, place: Place, stamp: str, seen: Seen, *, began: int, kind: str = "picture") -> None:
        """Remembers what was read of a place, if its file had not just been changed.

        `began` is when the scan began to list the source, in nanoseconds since 1970.
        """
        if self._base is None or not stamp or changed_at(stamp) > began - RACY_NS:
            return
        x, y = seen.focus or (None, None)
        look = seen.look.to_bytes(LOOK_BYTES, "big")
        digest = bytes.fromhex(seen.digest)
        self._waiting.append((_key(root, place, kind), stamp, VERSION, digest, *seen.size, look, seen.alpha, x, y))
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def close(self) -> None:
        """Writes what is still to be written."""
        self._flush()
        if self._base is not None:
            self._base.close()
            self._base = None

    def _flush(self) -> None:
        if self._base is None or not self._waiting:
            return
        try:
            self._base.execute("BEGIN IMMEDIATE")
            self._base.executemany(f"INSERT OR REPLACE INTO pictures VALUES ({', '.join('?' * 10)})", self._waiting)
            self._base.execute("COMMIT")
            self._waiting.clear()
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        # an OSError would name the cache's folder, and warnings hold no absolute path
        reason = printable(error) if isinstance(error, sqlite3.Error) else "it cannot be written"
        self.warning = (
            f"scan.sqlite in the cache could not be used ({reason}): pictures that have not changed are read again; "
            "delete it if this stays so"
        )
        self._waiting.clear()
        if self._base is not None:
            self._base.close()
            self._base = None


def _key(root: str, place: Place, kind: str) -> bytes:
    text = "\0".join([root, kind, place.file, str(place.start)])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
