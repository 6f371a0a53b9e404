"""Signals, and the words in RUN/control, that ask a run to stop, or to save and go on.

Here: that they are heard. Not here: what a run does about them (`loop.py`), and reading RUN/control (`control.py`).
"""

import _thread
import contextlib
import ctypes
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lorakit.core.errors import InterruptedRun, Stopped
from lorakit.core.processes import gather_objects
from lorakit.training.control import Control

STOPS = (signal.SIGINT, signal.SIGTERM)

GRACE = 1.0
"""Seconds in which a second signal is the first one once more: `timeout`, a terminal and launchers often send two."""

_C_SIG_DFL = 0  # <signal.h>


@dataclass(frozen=True)
class Wishes:
    """What the ranks want at a step's end; `stop` is the signal that asks for it."""

    stop: int | None
    save: bool
    sample: bool


class Interrupt:
    """What this process has been asked for.

    A signal to stop raises Stopped at once, wherever the main thread is, while there is nothing to lose (scanning,
    loading, caching). Within `noting` it is only noted, for the next step's end.
    """

    def __init__(self) -> None:
        self._stop: int | None = None
        self._signalled = self._raised = False
        self._asked: set[str] = set()
        self._noting = 0
        self._control: Control | None = None
        self._over, self._changing = False, _thread.allocate_lock()

    def listen(self, folder: Path) -> None:
        """From now on hears the words in `folder`/control too: on one rank, once the folder is its own."""
        self._control = Control(folder)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Signals are noted within; what was noted stays noted, and nothing is raised at the end."""
        self._noting += 1
        try:
            yield
        finally:
            self._noting -= 1

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Stopped takes the place of an error that comes of it: libraries make one of their own of what is raised
        within them, or trip over what was left half done."""
        try:
            yield
        except Exception as error:
            if self._raised:
                raise self._stopped() from error
            raise

    @property
    def pending(self) -> bool:
        """Whether this process was asked to stop."""
        self._look()
        return self._stop is not None

    def check(self) -> None:
        """Raises Stopped, outside of `noting`, where this process was asked to stop: by RUN/control, or by a signal
        whose exception was lost, as Python loses those that are raised while an object is deleted."""
        if self.pending and not self._noting:
            self._raised = True
            raise self._stopped()

    def votes(self) -> tuple[float, ...]:
        """This rank's part of what `decided` reads; a wish to save or sample is thereby said, and forgotten."""
        self._look()
        asked, self._asked = self._asked, set()  # a signal between these two still finds the set that is read below
        stops = [float(number == self._stop) for number in STOPS]
        return (*stops, float("save" in asked), float("sample" in asked))

    def stop_of_any(self) -> int | None:
        """The signal that asks for a stop, of the first rank that was asked; all ranks call this together."""
        return next((number for number in gather_objects(self._stop if self.pending else None) if number), None)

    def _look(self) -> None:
        words = self._control.read() if self._control else frozenset()
        self._asked |= words - {"stop"}
        if "stop" in words and self._stop is None:
            self._stop = signal.SIGTERM

    def _stopped(self) -> Stopped:
        assert self._stop is not None
        return Stopped(self._stop)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._asked.add("save")
            return
        if self._signalled:
            return
        self._signalled, self._stop = True, self._stop or number
        # not threading.Thread, whose locks the main thread may be holding
        _thread.start_new_thread(self._let_go, ())
        if not self._noting:
            self._raised = True
            raise self._stopped()

    def _let_go(self) -> None:
        """Lets the next signal end the process at once, also while the main thread is in a call that takes long: so
        this is another thread, in which Python's own `signal.signal` cannot be called."""
        time.sleep(GRACE)
        with self._changing:
            for number in STOPS if not self._over else ():
                ctypes.CDLL(None).signal(int(number), _C_SIG_DFL)

    def _end(self) -> None:
        with self._changing:
            self._over = True


def decided(votes: Sequence[float]) -> Wishes:
    """What the ranks' summed votes ask for."""
    *stops, save, sample = votes
    stop = next((int(number) for number, vote in zip(STOPS, stops, strict=True) if vote), None)
    return Wishes(stop, bool(save), bool(sample))


@contextlib.contextmanager
def watched() -> Iterator[Interrupt]:
    """Hears signals within, and gives the old handlers back at the end.

    Raises InterruptedRun in the place of Stopped, and of what came of it. Signals can be heard in the main thread
    only; elsewhere none is.
    """
    interrupt = Interrupt()
    hook, before = sys.unraisablehook, {}

    def tell(lost: "sys.UnraisableHookArgs") -> None:
        if not isinstance(lost.exc_value, Stopped):  # one that Python lost in a deletion is raised again by `check`
            hook(lost)

    sys.unraisablehook = tell
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (*STOPS, signal.SIGUSR1):
            before[number] = signal.signal(number, interrupt._heard)
    try:
        with interrupt.ending():
            yield interrupt
    except Stopped as stopped:
        raise InterruptedRun(f"{stopped} What was made so far is kept.", signal_number=stopped.signal_number) from None
    finally:
        interrupt._end()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
