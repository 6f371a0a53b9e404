"""The exceptions that lorakit raises on purpose, each with the exit code that the command line ends with."""

import signal
from collections.abc import Sequence


class LorakitError(Exception):
    """Base of all errors that are meant for a person to read.

    `everywhere`: every rank of a run raises it at the same place, so that one telling is enough.
    """

    exit_code = 1
    everywhere = False


class InputError(LorakitError):
    """The user's input is wrong. `problems` lists all that was found: what, where, and what to do about it."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, "an InputError needs a problem"
        super().__init__("\n".join(self.problems))


class DivergedError(LorakitError):
    """The training produced nothing but non-finite losses."""

    exit_code = 3
    everywhere = True


class StorageError(LorakitError):
    """The disk is full, or a file or folder may not be written."""

    exit_code = 4


class InterruptedRun(LorakitError):
    """A signal ended the run, what it had made was saved; `exit_code` is 128 + the signal's number."""

    everywhere = True

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Stopped(KeyboardInterrupt):
    """A signal ends what is going on at once: it passes `except Exception`, so that nobody takes it for a failure.

    At the edge of the run `training.interrupt.watched` makes an InterruptedRun of it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)  # its arguments, so that it can be sent to other ranks
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"Stopped by {signal.Signals(self.signal_number).name}."


class LostProcess(LorakitError):
    """Another process that this one works with has ended or does not answer."""


class VerificationError(LorakitError):
    """A written adapter or model did not give back what was trained; the file was removed."""

    exit_code = 1
