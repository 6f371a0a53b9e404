"""Two gloo processes on this machine, and the same functions with one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from lorakit.core import processes

WORKER = """
import datetime, signal, sys, threading, time
import torch
import torch.distributed as dist
from lorakit.core import processes
from lorakit.core.errors import InputError

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
assert (processes.world(), processes.rank()) == (2, rank)
assert processes.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]

mine = [torch.randn(5, 3, generator=torch.Generator().manual_seed(10 + rank)), torch.full((1,), 10.0**rank)]
both = [torch.randn(5, 3, generator=torch.Generator().manual_seed(10 + r)) for r in (0, 1)]
summed = [t.clone() for t in mine]
processes.sum_tensors(summed)
assert torch.equal(summed[0], both[0] + both[1]) and summed[1].item() == 11.0
assert len(set(processes.gather_objects(summed[0].numpy().tobytes()))) == 1, "the same bits on every rank"

asked = [processes.gather_objects(processes.first_to_say(what)) for what in ("a", "b", "a")]
assert [sum(answers) for answers in asked] == [1, 1, 0]

assert processes.on_first_rank(lambda: f"from {rank}") == "from 0"
def refuse():
    raise InputError(["a", "b"])
try:
    processes.on_first_rank(refuse)
except InputError as error:
    assert error.problems == ["a", "b"]
else:
    raise SystemExit("rank 0's error must reach every rank")

# what each rank does
assert processes.together(lambda: f"from {rank}") == f"from {rank}"
assert processes.on_each_rank(lambda: f"from {rank}") == ["from 0", "from 1"]
for each in (processes.together, processes.on_each_rank):
    def one_refuses():
        if rank == 1:
            raise InputError(["of rank 1"])
    try:
        each(one_refuses)
    except InputError as error:
        assert error.problems == ["of rank 1"] and error.everywhere
    else:
        raise SystemExit("the error of any rank must reach every rank")

# an action that takes longer than any collective may
processes.HEARTBEAT = 0.2
held = []
broadcast = dist.broadcast_object_list

def timed(values, src):
    start = time.monotonic()
    broadcast(values, src=src)
    held.append(time.monotonic() - start)

dist.broadcast_object_list = timed
def slow():
    time.sleep(1.5)
    return threading.current_thread() is not threading.main_thread()
assert processes.on_first_rank(slow) is True
assert len(held) >= 4 and max(held) < 1.0, held
met = []
gather = dist.all_gather_object
dist.all_gather_object = lambda *args: (met.append(1), gather(*args))
assert processes.on_each_rank(lambda: time.sleep(1.2 * rank)) == [None, None] and len(met) >= 4
def endless():
    while True:
        time.sleep(0.02)
start = time.monotonic()
try:
    processes.on_each_rank(endless if rank == 0 else refuse)
except InputError:
    assert time.monotonic() - start < 5, "the others are ended"
else:
    raise SystemExit("the error of one rank must end the others")
assert not any(t.name.startswith("Thread") and t.is_alive() for t in threading.enumerate()), threading.enumerate()
def slow_refusal():
    time.sleep(0.5)
    raise InputError(["late"])
try:
    processes.on_first_rank(slow_refusal)
except InputError as error:
    assert error.problems == ["late"]
else:
    raise SystemExit("a late error must reach every rank too")
assert processes.on_first_rank(lambda: None) is None

# Ctrl-C on the first rank ends its waiting, what it waits for, and all others
ended = []
def interrupted():
    try:
        while True:
            time.sleep(0.02)
    finally:
        time.sleep(0.3)
        ended.append("cleaned up")
processes.barrier()
if rank == 0:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts in the background has it ignored
    threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
start = time.monotonic()
try:
    processes.on_first_rank(interrupted)
except KeyboardInterrupt:
    assert time.monotonic() - start < 5
    assert ended == ["cleaned up"] * (rank == 0)
else:
    raise SystemExit("KeyboardInterrupt must pass")

# an error of a library that cannot travel
class Odd(Exception):
    def __init__(self, *, code):
        self.code = code
def odd():
    raise Odd(code=5)
try:
    processes.on_first_rank(odd)
except Odd:
    assert rank == 0
except RuntimeError as error:
    assert rank == 1 and "rank 0 failed: Odd" in str(error)
processes.barrier()
processes.leave()
assert processes.world() == 1
print("fine")
"""


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_agree():
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    for process, (out, err) in zip(started, ended):
        assert process.returncode == 0, err
        assert "fine" in out


def test_alone_everything_is_the_identity():
    assert (processes.world(), processes.rank()) == (1, 0)
    assert processes.gather_objects("x") == ["x"]
    tensor = torch.randn(3)
    before = tensor.clone()
    processes.sum_tensors([tensor])
    processes.barrier()
    assert torch.equal(tensor, before)
    assert processes.on_first_rank(lambda: 5) == 5


def test_alone_an_action_runs_where_it_is_called():
    import threading

    assert processes.on_first_rank(threading.current_thread) is threading.current_thread()


LOST = """
import datetime, json, os, signal, socket, sys, time
import torch
import torch.distributed as dist
from lorakit.core import processes
from lorakit.core.errors import LostProcess

torch.set_num_threads(1)
processes.HEARTBEAT, processes._PATIENCE = 0.3, 0.5

def act():
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.05)

def work(scenario, victim, rank):
    if scenario == "barrier" and rank == victim:
        time.sleep(30)
    while True:
        if scenario in ("sum", "hung"):
            processes.sum_tensors([torch.ones(1000)])
        elif scenario == "gather":
            processes.gather_objects("x" * 1000)
        elif scenario == "barrier":
            processes.barrier()
        else:
            processes.on_first_rank(act)

def start(scenario, victim):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids, ready = [], []
    for rank in range(3):
        reads, writes = os.pipe()
        said = os.memfd_create("said")
        pid = os.fork()
        if pid == 0:
            os.dup2(said, 2)
            limit = datetime.timedelta(seconds=4 if scenario == "hung" else 60)
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=limit
            )
            processes.barrier()
            os.write(writes, b"1")
            try:
                work(scenario, victim, rank)
            except LostProcess as error:
                print(error, file=sys.stderr, flush=True)
                processes.end_now(error.exit_code)  # as the command line does
        pids.append((pid, said))
        ready.append(reads)
    return pids, ready

scenarios = {"sum": 1, "gather": 0, "barrier": 2, "hung": 1, "first": 0, "another": 2}
started = {scenario: start(scenario, victim) for scenario, victim in scenarios.items()}
for pids, ready in started.values():
    for reads in ready:
        os.read(reads, 1)
time.sleep(0.5)
began = time.monotonic()
for scenario, victim in scenarios.items():
    os.kill(started[scenario][0][victim][0], signal.SIGSTOP if scenario == "hung" else signal.SIGKILL)
outcome = {}
for scenario in sorted(scenarios, key=lambda name: name == "hung"):
    for rank, (pid, said) in enumerate(started[scenario][0]):
        if rank == scenarios[scenario]:
            continue
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - began > 40:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        text = os.pread(said, 10000, 0).decode()
        outcome[f"{scenario} {rank}"] = os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began, text
    os.kill(started[scenario][0][scenarios[scenario]][0], signal.SIGKILL)
print(json.dumps(outcome))
"""


def test_where_one_of_three_is_killed_or_hangs_the_others_end_with_one_message():
    ended = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads(ended.stdout)
    assert len(outcome) == 12
    for who, (code, seconds, said) in outcome.items():
        assert code == 1, (who, code, said)
        assert seconds < 20, (who, seconds)
        assert said.count("Another of the 3 processes") == 1 and len(said.splitlines()) == 1, (who, said)


def test_an_end_does_not_wait_for_threads():
    code = (
        "import threading, time\n"
        "from lorakit.core.processes import end_now\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('said', end='')\n"
        "end_now(143)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.returncode) == ("said", 143)


def test_workers_leave_signals_to_the_parent():
    code = (
        "import os, signal\n"
        "from lorakit.core.processes import leave_signals_to_the_parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n"
        "leave_signals_to_the_parent(0)\n"
        "for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), number)\n"
        "print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("still here\n", -15)


def test_a_killed_process_leaves_no_worker_behind() -> None:
    code = """
import multiprocessing, os, signal, time
from lorakit.core.processes import leave_signals_to_the_parent
def work():
    leave_signals_to_the_parent(0)
    print(os.getpid(), flush=True)
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{worker}").exists():
        state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead, and nobody has asked for it yet
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
