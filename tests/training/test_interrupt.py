"""Signals are noted, voted on, and the second one acts as ever."""

import os
import signal

import pytest

from lorakit.training.interrupt import SIGNALS, decided, watched


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with watched() as interrupt:
        assert decided(interrupt.votes()) is None
        os.kill(os.getpid(), number)
        assert decided(interrupt.votes()) == number
        assert signal.getsignal(number) == signal.SIG_DFL, "the second one ends at once"
    assert signal.getsignal(number) == before


def test_votes_of_several_ranks_are_one_decision() -> None:
    assert decided((0.0, 3.0)) == signal.SIGTERM
    assert decided((1.0, 3.0)) == signal.SIGINT
    assert decided((0.0, 0.0)) is None
