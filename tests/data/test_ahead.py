"""Worker processes: in order, through signals and deaths, and gone when nobody wants them any more."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lorakit.core.errors import LostProcess
from lorakit.data import ahead
from lorakit.data.ahead import by_processes


@pytest.fixture(autouse=True)
def _noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks after its workers every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


class Made(Dataset):
    """n → a tensor that says so and the process that made it. Item `fatal` kills its process, `slow` takes long."""

    def __init__(self, *, fatal: int = -1, slow: int = -1) -> None:
        self.fatal, self.slow = fatal, slow

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.slow:
            time.sleep(60)
        return torch.full((3000,), float(number)), os.getpid()


def living(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_all_in_order_and_workers_end() -> None:
    made = list(by_processes(Made(), range(3, 20), 3))
    assert [int(tensor[0]) for tensor, _ in made] == list(range(3, 20))
    pids = {pid for _, pid in made}
    assert len(pids) == 3 and not living(pids)


def test_a_worker_that_is_killed_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made, dead = [], set()
    for tensor, pid in by_processes(Made(), [number * 7 for number in range(30)], 2):
        made.append(int(tensor[0]))
        if len(made) in (5, 20):
            os.kill(pid, signal.SIGKILL)
            dead.add(pid)
    assert made == [number * 7 for number in range(30)]
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == len(dead) == 2 and all("signal 9" in record.getMessage() for record in said)


def test_one_that_dies_again_and_again_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    made = []
    with pytest.raises(LostProcess, match=r"4 times in a row .*signal 9.*data\.workers"):
        for tensor, _ in by_processes(Made(fatal=5), range(10), 2):
            made.append(int(tensor[0]))
    assert made == list(range(len(made))) and len(made) <= 5 and len(caplog.records) == 3


def test_deaths_far_apart_are_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_RESTARTS", 1)
    monkeypatch.setattr(ahead, "_ENOUGH", 5)
    count = 0
    for _, pid in by_processes(Made(), range(40), 1):
        count += 1
        if count % 12 == 0:
            os.kill(pid, signal.SIGKILL)
    assert count == 40


def test_an_error_of_what_is_made_is_no_death() -> None:
    class Broken(Dataset):
        def __getitem__(self, number: int) -> int:
            raise OSError("it cannot be read")

    with pytest.raises(OSError, match="it cannot be read"):
        next(by_processes(Broken(), range(5), 2))


def test_workers_that_are_busy_do_not_delay_the_end() -> None:
    things = by_processes(Made(slow=3), range(10), 2)
    pids = {next(things)[1] for _ in range(3)}
    began = time.monotonic()
    things.close()
    assert time.monotonic() - began < 2 and not living(pids)


def test_the_main_thread_hears_nothing_of_its_children() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    with contextlib.closing(by_processes(Made(), range(10), 2)) as things:
        next(things)
        assert signal.getsignal(signal.SIGCHLD) == before


GROUP = """
import os, signal, sys, time
from tests.data.test_ahead import Made
from lorakit.data.ahead import by_processes
heard = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
made = []
for tensor, _ in by_processes(Made(), range(60), 2):
    made.append(int(tensor[0]))
    if len(made) == 10:
        print("ready", flush=True)
        while len(heard) < 3:
            time.sleep(0.01)
assert made == list(range(60)), made
print("fine", flush=True)
"""


def test_signals_to_the_whole_group_leave_the_workers_at_work() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "fine\n", "")


HUNG_UP = """
import os, sys, time
from multiprocessing import connection, resource_sharer
from lorakit.data.ahead import become_a_worker

become_a_worker(0)
resource_sharer.DupFd(os.dup(1))
connection.SocketClient(resource_sharer._resource_sharer._address).close()
time.sleep(0.5)
print("as ever", flush=True)
try:
    raise ValueError("seen")
except ValueError:
    sys.excepthook(*sys.exc_info())
"""


def test_a_worker_says_nothing_of_a_parent_that_hung_up() -> None:
    """An interrupted parent leaves the worker's thread that hands tensors over in the middle of a greeting."""
    done = subprocess.run([sys.executable, "-c", HUNG_UP], capture_output=True, text=True, timeout=60)
    assert done.stdout == "as ever\n" and done.returncode == 0
    assert done.stderr.count("Traceback") == 1 and "ValueError: seen" in done.stderr
