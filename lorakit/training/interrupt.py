"""Signals that end a run after its state is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Which of `SIGNALS` has arrived; a second one of a kind acts as if there were no handler."""

    def __init__(self) -> None:
        self.received: set[int] = set()

    def votes(self) -> tuple[float, ...]:
        return tuple(float(number in self.received) for number in SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        signal.signal(number, signal.SIG_DFL)


def decided(votes: tuple[float, ...]) -> int | None:
    """The signal that the ranks' summed votes ask for."""
    return next((int(number) for number, vote in zip(SIGNALS, votes, strict=True) if vote), None)


@contextlib.contextmanager
def watched() -> Iterator[Interrupt]:
    """Notes signals instead of dying of them; the old handlers come back at the end.

    Signals can be watched in the main thread only; elsewhere nothing is noted.
    """
    interrupt = Interrupt()
    try:
        before = {number: signal.signal(number, interrupt._note) for number in SIGNALS}
    except ValueError:
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
