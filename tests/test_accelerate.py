"""The ready configurations in recipes/accelerate: Accelerate reads them, and what a CPU can run of them runs.

Here also two "machines": network namespaces with an address each. gpus.yaml, sharded.yaml and cpu_x2.yaml are started
by tests/verbs/test_processes.py.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lorakit.families import sd
from lorakit.recipe import build
from tests.verbs.conftest import write_pictures

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_there_is_one_for_each_case() -> None:
    assert [file.stem for file in FILES] == ["cpu_x2", "gpus", "machines", "one_gpu", "sharded"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it_and_it_says_when(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = file.read_text()
    given, known = yaml.safe_load(text), load_config_from_file(str(file)).to_dict()
    assert {key: known[key] for key in given} == given  # what it does not know, it refuses
    comment = text.partition("compute_environment")[0]
    assert all(line.startswith("#") for line in comment.splitlines()) and len(comment) > 150
    assert f"--config_file recipes/accelerate/{file.name}" in comment


NAMES = tuple(f"lorakit-{os.getpid()}-{which}" for which in ("one", "two"))  # others may test here too
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, each with an address that only the other can reach, and its own 127.0.0.1."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip`")

    def run(*words: str) -> None:
        subprocess.run([ip, *words], check=True, capture_output=True)

    try:
        for name in NAMES:
            run("netns", "add", name)
        run("link", "add", "one", "netns", NAMES[0], "type", "veth", "peer", "name", "two", "netns", NAMES[1])
        for name, device, address in zip(NAMES, ("one", "two"), ADDRESSES, strict=True):
            run("-n", name, "addr", "add", f"{address}/24", "dev", device)
            run("-n", name, "link", "set", device, "up")
            run("-n", name, "link", "set", "lo", "up")
        yield [ip, "netns", "exec"]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in NAMES:
            subprocess.run([ip, "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_with_addresses_of_their_own_train_together(machines: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        build(
            {
                "model": {"path": str(sd.tiny().path)},
                "adapter": {"rank": 2, "targets": ["to_q"]},
                "data": {
                    "sources": [{"path": str(write_pictures(tmp_path / "photos", 4))}],
                    "cache": str(tmp_path / "cache"),
                    "buckets": {"resolution": 32},
                },
                "run": {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 2, "shard": True},
            }
        ).to_toml()
    )
    with contextlib.ExitStack() as stack:
        started = []
        for number, (name, device) in enumerate(zip(NAMES, ("one", "two"), strict=True)):
            launch = [*machines, name, sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
            launch += [str(FILES[2]), "--num_processes", "2", "--machine_rank", str(number)]
            launch += ["--main_process_ip", ADDRESSES[0], "-m", "lorakit", "train", str(recipe)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": device}
            process = subprocess.Popen(
                launch, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            stack.callback(process.kill)
            started.append(process)
        ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0
    assert "lies in 2 parts" in ended[0][1] and "Step 2 reached" in ended[0][0] and "Step 2" not in ended[1][0]
