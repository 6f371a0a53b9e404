"""Runs of `lorakit` in processes of their own that cost no imports, to be killed and gone on with.

    with Server(folder) as server:
        run = server.start("train", recipe_file)    # the words of the command line, or call="module:function"
        run.wait_for("save", step=4)
        run.kill(signal.SIGTERM)                    # or run.kill(…, rank=1), or run.kill_group(…), workers and all
        assert run.wait() == 143 and "saved" in run.output()
        assert server.run("train", "--resume", folder).codes == [0]

What can be waited for (`patches.trace`): "step" (done), "micro" (before a forward), and the beginnings of "cache",
"loop", "save", "sample", "validate" and "finish". `patches` names functions of patches.py with their arguments, which
the child calls before it begins: `patches=[("slow", {"where": "lorakit.training.checkpoint:save", "seconds": 1})]`.
`ranks=3` starts three processes in the environment that a launcher gives. Each process has its own random state; all of
a run are one process group.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Patch = tuple[str, Mapping[str, Any]]


class Server:
    """A process with all imports done, which forks the processes of runs; logs and traces go into `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ended: dict[int, int] = {}
        self._news = threading.Condition()  # of the one thread that reads; whoever asks need not wait for it
        self._started: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._turn = threading.Lock()  # several threads may each look after a run
        self._answers, theirs = os.pipe()
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._log = open(folder / "server.log", "ab")  # noqa: SIM115 - held for the life of the server
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.server", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs],
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.model: str = self._answer(timeout=120)["model"]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server; runs that still go die with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._reader.join(timeout=20)
        self._log.close()

    def start(
        self,
        *arguments: str | Path,
        call: str = "",
        patches: Sequence[Patch] = (),
        env: Mapping[str, str] | None = None,
        ranks: int = 1,
    ) -> "Run":
        """Starts `lorakit ARGUMENTS`, or function(*arguments) where `call` is "module:function"."""
        with self._turn:
            return self._start(arguments, call=call, patches=patches, env=env or {}, ranks=ranks)

    def _start(
        self,
        arguments: Sequence[str | Path],
        *,
        call: str,
        patches: Sequence[Patch],
        env: Mapping[str, str],
        ranks: int,
    ) -> "Run":
        self._count += 1
        names = [self.folder / f"{self._count:04d}-{rank}" for rank in range(ranks)]
        request = {
            "arguments": [str(argument) for argument in arguments],
            "call": call,
            "patches": list(patches),
            "env": dict(env),
            "ranks": ranks,
            "port": _free_port() if ranks > 1 else 0,
            "outputs": [f"{name}.log" for name in names],
            "traces": [f"{name}.jsonl" for name in names],
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Run(self, self._answer(timeout=30)["started"], names)

    def run(self, *arguments: str | Path, timeout: float = 120, **how: Any) -> "Run":
        """`start` and wait for the end."""
        run = self.start(*arguments, **how)
        run.wait(timeout)
        return run

    def code(self, pid: int, *, timeout: float) -> int | None:
        """How the process ended (-9: by SIGKILL), None while it lives after `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: pid in self._ended, timeout)
            return self._ended.get(pid)

    def _answer(self, *, timeout: float) -> dict[str, Any]:
        """The server's answer to the last request."""
        try:
            answer = self._started.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no answer; see {self.folder / 'server.log'}") from None
        assert answer is not None, f"the server has ended: {(self.folder / 'server.log').read_text()}"
        return answer

    def _read(self) -> None:
        """The thread that hears the server until it ends."""
        with os.fdopen(self._answers, "rb") as answers:
            for line in answers:
                answer = json.loads(line)
                if "ended" in answer:
                    with self._news:
                        self._ended[answer["ended"]] = answer["code"]
                        self._news.notify_all()
                else:
                    self._started.put(answer)
        self._started.put(None)


class Run:
    """The processes of one run, one for each rank."""

    def __init__(self, server: Server, pids: list[int], names: Sequence[Path]) -> None:
        self._server, self.pids, self._names = server, pids, names
        self.started = time.monotonic()

    @property
    def codes(self) -> list[int | None]:
        """The exit codes; None where a process lives."""
        return [self._server.code(pid, timeout=0) for pid in self.pids]

    @property
    def alive(self) -> bool:
        return None in self.codes

    def wait(self, timeout: float = 120) -> int:
        """Waits for all ranks; the exit code of rank 0. TimeoutError after `timeout` seconds: the run is killed."""
        end = time.monotonic() + timeout
        for pid in self.pids:
            if self._server.code(pid, timeout=max(0.0, end - time.monotonic())) is None:
                text = self.output()
                self.kill_group(signal.SIGKILL)
                raise TimeoutError(f"the run did not end in {timeout:.0f} s:\n{text[-4000:]}")
        code = self.codes[0]
        assert code is not None
        return code

    def kill(self, number: int = signal.SIGKILL, *, rank: int = 0) -> None:
        """Sends a signal to one rank, if it lives."""
        if self._server.code(self.pids[rank], timeout=0) is None:
            os.kill(self.pids[rank], number)

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes of the run, loader workers too, as a terminal or a scheduler does."""
        if self.alive:
            os.killpg(self.pids[0], number)

    def wait_for(self, event: str, *, step: int | None = None, rank: int = 0, timeout: float = 60) -> None:
        """Waits until the trace has `event`, of `step` if given. AssertionError where the run ends before."""
        end = time.monotonic() + timeout
        while True:
            ended = self._server.code(self.pids[rank], timeout=0) is not None
            for line in self.trace(rank):
                if line["event"] == event and step in (None, line.get("step")):
                    return
            assert not ended, f"the run ended before {event} {step}:\n{self.output(rank)[-4000:]}"
            assert time.monotonic() < end, f"no {event} {step} in {timeout:.0f} s:\n{self.output(rank)[-4000:]}"
            time.sleep(0.004)

    def output(self, rank: int | None = None) -> str:
        """What the run wrote to stdout and stderr: one rank's, or all ranks'."""
        files = [Path(f"{name}.log") for name in (self._names if rank is None else [self._names[rank]])]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def trace(self, rank: int = 0) -> list[dict[str, Any]]:
        """The whole lines of a rank's trace."""
        file = Path(f"{self._names[rank]}.jsonl")
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
