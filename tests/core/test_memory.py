"""Memory that was freed is the system's again."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorakit.core.memory import give_back, is_lack, leave_file, peak


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's affair")
def test_what_is_freed_is_given_back() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    give_back()
    before = resident()
    pieces = [torch.ones(1 << 14) for _ in range(1000)]  # 64 MB, in pieces that glibc keeps
    full = resident()
    last = pieces[-1]
    pieces.clear()
    give_back()
    assert full - before > 50 << 20
    assert resident() - before < 10 << 20
    assert last[0] == 1 and (peak() or 0) > full - (4 << 20), "the system counts in steps"


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux alone")
def test_what_leaves_its_file_is_not_resident_and_comes_back(tmp_path: Path) -> None:
    written = {name: torch.rand(1 << 22) for name in "abc"}  # 16 MB each
    save_file(written, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in "abc"}

    def of_files() -> int:
        return psutil.Process().memory_info().shared

    assert all(tensors[name].equal(written[name]) for name in "abc")
    before = of_files()
    leave_file(tensors["b"])
    assert 15 << 20 < before - of_files() < 17 << 20
    assert tensors["b"].equal(written["b"]) and of_files() > before - (1 << 20)
    own = torch.rand(1 << 22)
    copy = own.clone()
    leave_file(own)
    assert own.equal(copy), "in no file"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's affair")
def test_what_is_freed_may_be_kept_for_what_comes_next() -> None:
    """In a process of its own, since it lasts."""
    program = """
import resource, torch
from lorakit.core.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ever = faults()
keep_freed()
faults()
assert faults() < ever / 10, (ever, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("rank 1 failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("rank 1 failed: MemoryError: "),
    ],
)
def test_lack_of_memory_is_known_in_all_the_words_that_there_are_for_it(error: Exception) -> None:
    assert is_lack(error)


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED", ""])
def test_other_errors_are_none(text: str) -> None:
    assert not is_lack(RuntimeError(text))
