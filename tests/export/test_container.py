"""lorakit/export/container.py: whatever is in a file, it gives our error or the adapter that was written."""

import json
import random
import time
from pathlib import Path

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.export import read_adapter, write_adapter
from lorakit.export.container import Tensors
from tests.export import fuzz


def test_two_thousand_damaged_files_are_refused_or_are_what_was_written(tmp_path) -> None:
    counts = fuzz.hammer(tmp_path, range(2000))
    assert counts["refused"] > 1000
    assert counts["the same"] > 100, "what harms nobody is read: a title, a blank"


def test_without_the_digest_some_would_load_changed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lorakit.export.files.digests", lambda file: {})
    with pytest.raises(AssertionError, match="loads changed"):
        fuzz.hammer(tmp_path, range(2000))


def kohya(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write_adapter(fuzz.adapter(), path, format="kohya", family=fuzz.model())
    return path


@pytest.mark.parametrize("mutate", fuzz.MUTATIONS)
def test_a_mutation_mutates(tmp_path, mutate) -> None:
    data = kohya(tmp_path).read_bytes()
    assert sum(mutate(data, random.Random(n)) != data for n in range(20)) > 10


def test_a_hundred_thousand_keys_and_a_huge_header_are_refused_in_time(tmp_path) -> None:
    path = kohya(tmp_path)
    header, body = fuzz.split(path.read_bytes())
    one = next(key for key in header if key.endswith("lora_up.weight"))
    many = {f"x{i}.lora_up.weight": {**header[one], "data_offsets": [0, 0], "shape": [0]} for i in range(100_000)}
    path.write_bytes(fuzz.joined({**many, **header}, body))
    started = time.process_time()
    with pytest.raises(InputError):
        read_adapter(path, family=fuzz.model())
    path.write_bytes((99_999_999).to_bytes(8, "little") + b"{" + b" " * 99_999_998)
    with pytest.raises(InputError, match="damaged or cut off"):
        read_adapter(path, family=fuzz.model())
    assert time.process_time() - started < 30


def test_a_name_that_is_given_twice_is_damage(tmp_path) -> None:
    path = kohya(tmp_path)
    header, body = fuzz.split(path.read_bytes())
    twice = json.dumps(header)[:-1] + ", " + json.dumps({k: v for k, v in header.items() if "conv" in k})[1:]
    path.write_bytes(fuzz.joined(twice, body))
    with pytest.raises(InputError, match="damaged or cut off"):
        read_adapter(path, family=fuzz.model())


def test_tensors_are_read_when_they_are_asked_for(tmp_path) -> None:
    tensors = Tensors({"": kohya(tmp_path)})
    assert len(tensors) == len(list(tensors)) == 15
    assert "x" not in tensors
    assert torch.equal(tensors["lora_unet_to_q.alpha"], torch.tensor(2.0))
