"""Signals end at once what can be lost, are noted where something would be, and the second one acts as ever."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.core.errors import InterruptedRun, Stopped
from lorakit.training import interrupt as module
from lorakit.training.interrupt import STOPS, Interrupt, Wishes, decided, watched

NOTHING = Wishes(None, save=False, sample=False)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 30.0)  # no thread changes handlers during a test


def send(number: int) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_at_once_what_is_not_the_loop(number: int) -> None:
    before = [signal.getsignal(n) for n in (*STOPS, signal.SIGUSR1)]
    reached = []
    with pytest.raises(InterruptedRun) as caught, watched() as interrupt:
        try:
            send(number)
        except Exception:  # what a library does that takes every error for its own
            reached.append("swallowed")
        finally:
            reached.append("cleaned up")
        reached.append("went on")
    assert reached == ["cleaned up"] and interrupt.pending
    assert caught.value.exit_code == 128 + number and signal.Signals(number).name in str(caught.value)
    assert [signal.getsignal(n) for n in (*STOPS, signal.SIGUSR1)] == before


@pytest.mark.parametrize("number", STOPS)
def test_within_noting_it_is_noted_and_nothing_is_raised(number: int) -> None:
    with watched() as interrupt:
        with interrupt.noting():
            assert decided(interrupt.votes()) == NOTHING and not interrupt.pending
            send(number)
            with interrupt.noting():
                send(STOPS[0])  # the same request once more: what came first counts
            assert interrupt.pending
            assert [decided(interrupt.votes()).stop for _ in range(2)] == [number, number], "until it is obeyed"
            interrupt.check()
        with pytest.raises(Stopped):
            interrupt.check()


def test_an_error_that_a_library_makes_of_it_is_no_other_end() -> None:
    outcome = []
    with pytest.raises(InterruptedRun), watched() as interrupt:
        try:
            with interrupt.ending():
                try:
                    send(signal.SIGTERM)
                except BaseException:
                    raise ValueError("a file cannot be read") from None
        except Stopped as stopped:
            outcome.append(stopped.exit_code)
            raise ValueError("and so on") from None
    assert outcome == [143]


def test_an_error_beside_a_noted_signal_is_its_own() -> None:
    with pytest.raises(ValueError, match="diverged"), watched() as interrupt, interrupt.noting():
        send(signal.SIGTERM)
        raise ValueError("diverged")


def test_an_exception_that_python_swallows_is_raised_at_the_next_check(monkeypatch: pytest.MonkeyPatch) -> None:
    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda seen: swallowed.append(seen.exc_type))

    class Deleted:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    with pytest.raises(InterruptedRun), watched() as interrupt:
        Deleted()
        assert swallowed == [Stopped]
        interrupt.check()
        pytest.fail("the signal was lost")


def test_a_second_signal_soon_after_raises_no_second_time() -> None:
    with pytest.raises(InterruptedRun), watched():
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_usr1_asks_for_a_save_once() -> None:
    with watched() as interrupt:
        send(signal.SIGUSR1)
        assert not interrupt.pending
        assert decided(interrupt.votes()) == Wishes(None, save=True, sample=False)
        assert decided(interrupt.votes()) == NOTHING


def test_votes_of_several_ranks_are_one_decision() -> None:
    assert decided((0.0, 3.0, 0.0, 0.0)) == Wishes(signal.SIGTERM, save=False, sample=False)
    assert decided((1.0, 3.0, 0.0, 2.0)) == Wishes(signal.SIGINT, save=False, sample=True)
    assert decided((0.0, 0.0, 1.0, 0.0)) == Wishes(None, save=True, sample=False)


def test_a_stop_of_any_rank_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched() as interrupt, interrupt.noting():
        assert interrupt.stop_of_any() is None
        monkeypatch.setattr(module, "gather_objects", lambda mine: [None, mine, 15])
        assert interrupt.stop_of_any() == 15
        send(signal.SIGINT)
        assert interrupt.stop_of_any() == 2


def test_words_in_the_control_file_are_wishes(tmp_path: Path) -> None:
    interrupt = Interrupt()
    (tmp_path / "control").write_text("stop\n")
    interrupt.listen(tmp_path)
    assert not interrupt.pending, "one from before is not meant for this run"
    (tmp_path / "control").write_text("sample save\n")
    assert decided(interrupt.votes()) == Wishes(None, save=True, sample=True)
    assert decided(interrupt.votes()) == NOTHING
    (tmp_path / "control").write_text("stop")
    with interrupt.noting():
        interrupt.check()
        assert interrupt.pending and decided(interrupt.votes()).stop == signal.SIGTERM
    with pytest.raises(Stopped):
        interrupt.check()


def test_a_signal_after_the_word_stop_is_a_first_one(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun) as caught, watched() as interrupt:
        interrupt.listen(tmp_path)
        (tmp_path / "control").write_text("stop")
        with interrupt.noting():
            assert decided(interrupt.votes()).stop == signal.SIGTERM
        send(signal.SIGINT)
    assert caught.value.exit_code == 143


def test_elsewhere_than_in_the_main_thread_nothing_is_heard() -> None:
    import threading

    seen = []

    def run() -> None:
        with watched() as interrupt:
            seen.append(interrupt.pending)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


SECOND = """
import ctypes, time
from lorakit.training import interrupt as module
module.GRACE = 0.5
with module.watched() as interrupt, interrupt.noting():
    print("ready", flush=True)
    while not interrupt.pending:
        time.sleep(0.01)
    print("noted", flush=True)
    lock = ctypes.create_string_buffer(64)  # a mutex, all zeros
    for _ in range(2):  # the second time waits for ever, in C, where Python's handlers have no turn
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


def start_waiting() -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)])
def test_a_second_signal_later_ends_the_process(first: int, second: int) -> None:
    with start_waiting() as process:
        assert process.stdout is not None
        process.send_signal(first)
        assert process.stdout.readline() == "noted\n"
        process.send_signal(second)
        time.sleep(0.1)
        assert process.poll() is None, "within the grace it is the first one once more"
        time.sleep(0.6)
        process.send_signal(second)
        assert process.wait(timeout=5) == -second


def test_a_run_that_has_ended_leaves_no_handler_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.05)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with pytest.raises(InterruptedRun), watched():
            send(signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stop_that_a_deletion_swallows_is_raised_again_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with pytest.raises(InterruptedRun), watched() as interrupt:
        Deleted()
        interrupt.check()
    assert told == [] and sys.unraisablehook == told.append
