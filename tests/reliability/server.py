"""The process that `harness.Server` starts: imports once, forks a child for each run asked for, and says how it ended.

Requests come as JSON lines on stdin, answers go as JSON lines to a pipe. It has one thread and has computed nothing
when it forks: no thread pool, no process group, no state of a training is handed on.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def imports() -> str:
    """Loads what a run loads, and returns the folder of the tiny model."""
    import torch

    torch.set_num_threads(1)
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    import lorakit

    # not `datasets`: pyarrow starts a thread, and only tables need it
    names = ["accelerate", "transformers", "peft.tuners.lora.bnb", "torch.distributed", "numpy.ma", "tomli_w"]
    names += [module.name for module in pkgutil.walk_packages(lorakit.__path__, "lorakit.")]
    for name in names:
        if not name.endswith(("__main__", ".kernels")):  # which need Triton
            importlib.import_module(name)
    from PIL import Image

    from lorakit.families import sd

    Image.init()

    model = sd.tiny()
    model.stock_pipeline()
    return str(model.path)


def main(answers: int) -> None:
    began = time.monotonic()
    model = imports()
    while len(threads()) > 1:  # loaders' threads take a moment to go
        time.sleep(0.05)
        assert time.monotonic() < began + 60, f"a forked child would lack the threads {threads()}"
    gc.collect()
    gc.freeze()  # a collection in a child need not copy what the parent holds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests' affair
    wake, woken = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    say(answers, {"ready": True, "model": model})
    requests = b""
    while True:
        for ready in select.select([0, wake], [], [])[0]:
            data = os.read(ready, 1 << 20)
            if ready == wake:
                continue
            if not data:
                return
            requests += data
        *lines, requests = requests.split(b"\n")
        for line in lines:
            say(answers, {"started": start(json.loads(line), closing=(answers, wake, woken))})
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            say(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def threads() -> list[str]:
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def say(pipe: int, message: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")


def start(request: dict[str, Any], *, closing: tuple[int, ...]) -> list[int]:
    """Forks the processes of a run, all in one process group named by the first."""
    pids: list[int] = []
    ranks = request["ranks"]
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            for pipe in closing:
                os.close(pipe)
            place = {}
            if ranks > 1:  # what accelerate's launcher sets
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
            run_child(request, place, rank)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def run_child(request: dict[str, Any], place: dict[str, Any], rank: int) -> None:
    """Becomes a process like one that a user starts, and ends as it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(request["outputs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    os.environ.update({name: str(value) for name, value in {**request["env"], **place}.items()})
    # a process of its own begins with its own random state: what comes of it by mistake must show
    import numpy as np
    import torch

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(int.from_bytes(os.urandom(4)))
    code = 1
    try:
        from tests.reliability import patches

        patches.trace(Path(request["traces"][rank]))
        for name, arguments in request["patches"]:
            getattr(patches, name)(**arguments)
        if request["call"]:
            module, _, function = request["call"].partition(":")
            getattr(importlib.import_module(module), function)(*request["arguments"])
        else:
            from lorakit.cli.main import main as command

            command(request["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> None:
    """Ends as an interpreter does, but for the taking apart of modules, which costs more than a short run."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
