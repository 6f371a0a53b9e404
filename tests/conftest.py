"""What all tests share: no network, no traces in the user's folders, few threads, quiet libraries."""

import os
import socket
import tempfile

# before any test imports a library
_CACHES = tempfile.mkdtemp(prefix="lorakit-tests-")
os.environ.update(
    HF_HOME=f"{_CACHES}/huggingface",
    XDG_CACHE_HOME=f"{_CACHES}/cache",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
)
for _name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)  # a test run is no part of somebody's launch
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil

import hypothesis
import pytest
import torch

from lorakit.core.quiet import quiet_libraries

quiet_libraries()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels can be read by its interpreter then, where there is triton
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

hypothesis.settings.register_profile("lorakit", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("lorakit")


def pytest_unconfigure(config):
    shutil.rmtree(_CACHES, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A connection to anything but this machine fails the test."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to connect to {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
