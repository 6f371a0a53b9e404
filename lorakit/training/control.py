"""`RUN/control`: a file with words that a run obeys at the end of its step, for who cannot send it a signal.

`echo save > RUN/control`: save (a checkpoint), sample (pictures), stop; one or several. The file goes once it is read.
"""

import logging
import os
import stat
from pathlib import Path

from lorakit.core.files import printable

log = logging.getLogger("lorakit")

WORDS = ("save", "sample", "stop")
_BYTES = 4096  # more than any words need


class Control:
    """The file `folder`/control; one that an earlier run left is not for this one, and goes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "control"
        self._deaf = False
        if self._take() is not None:
            log.warning("%s was left from before and is not obeyed.", printable(self._path))

    def read(self) -> frozenset[str]:
        """The words that were written there since, which costs a system call; never raises."""
        text = self._take()
        if text is None:
            return frozenset()
        words = text.lower().split()
        unknown = [word for word in words if word not in WORDS]
        if unknown:
            log.warning(
                "%s: %s is none of the words that a run obeys: %s.",
                printable(self._path),
                printable(" ".join(unknown)[:80]),
                ", ".join(WORDS),
            )
        return frozenset(words) & frozenset(WORDS)

    def _take(self) -> str | None:
        """What the file holds, which is removed; None where there is none, or one that is still to be filled."""
        if self._deaf:
            return None
        try:
            # no waiting for the other end of a pipe, no way out of the run's folder
            handle = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise OSError("it is no regular file")
                data = os.read(handle, _BYTES)
            finally:
                os.close(handle)
            if data:
                self._path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:  # what cannot be removed would be obeyed at every step
            self._deaf = True
            log.warning("%s is not obeyed any more: %s", printable(self._path), error.strerror or error)
            return None
        return data.decode("utf-8-sig", "replace") or None
