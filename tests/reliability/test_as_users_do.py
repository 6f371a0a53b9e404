"""Runs that are started as users start them, each with its own imports and hash seed, killed once and compared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.harness import ROOT, Server
from tests.reliability.scene import differences
from tests.reliability.survival import undisturbed


def lorakit(*arguments: str | Path, seed: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "lorakit", *map(str, arguments)], env=environment, cwd=ROOT)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_processes_of_their_own_give_the_same_bits(server: Server, recipe: Callable[..., Path], seed: int) -> None:
    how = ("adapter.text_encoder.rank=2", "run.ema.decay=0.9", "run.steps=40", "run.save_every=4", "run.sample_every=0")
    whole = undisturbed(server, recipe("whole", *how))
    file = recipe("killed", *how)
    folder = file.with_suffix("")
    first = lorakit("train", file, seed=seed)
    while not list((folder / "checkpoints").glob("step-*")):
        assert first.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.01)
    time.sleep(0.3 * seed)
    first.send_signal(signal.SIGKILL)
    assert first.wait(60) == -9 and not (folder / "adapter.safetensors").exists()
    assert lorakit("train", "--resume", folder, seed=seed + 10).wait(300) == 0
    assert differences(whole.folder, folder) == []
