"""A checkpoint is whole or is passed over; what comes back is what went in."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.core.errors import InputError, StorageError
from lorakit.training import checkpoint

STATE = {"step": 3, "digest": "d"}


def save(folder: Path, step: int) -> Path:
    adapter = {"unet.a.lora_A.weight": torch.full((2, 3), float(step))}
    optimizer = {"unet.a.lora_A.weight.exp_avg": torch.arange(6.0).reshape(2, 3)}
    return checkpoint.save(folder, step, adapter=adapter, optimizer=optimizer, state={**STATE, "step": step})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 200)
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and skipped == []
    assert found.path.name == "step-000200" and found.state["step"] == 200
    assert torch.equal(found.adapter["unet.a.lora_A.weight"], torch.full((2, 3), 200.0))
    assert sorted(p.name for p in found.path.iterdir()) == sorted([*checkpoint.FILES, "manifest.json"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink(), lambda p: p.write_bytes(b"")],
    ids=["flip", "truncate", "missing", "empty"],
)
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, name: str, damage) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1
    assert len(skipped) == 1 and "step-000002" in skipped[0] and name in skipped[0]


def test_a_damaged_manifest_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text("{")
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1


def test_none_that_verifies_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == (None, [])
    flip(save(tmp_path, 1) / "adapter.safetensors")
    with pytest.raises(InputError, match="step-000001 is damaged"):
        checkpoint.newest(tmp_path)


def test_a_failed_write_leaves_the_old_ones_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(StorageError, match="disk is full"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep=0)
    assert len(checkpoint.listed(tmp_path)) == 3
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["step-000010", "step-000100"]


def test_optimizer_state_is_restored_by_name() -> None:
    def steps(optimizer: torch.optim.Optimizer, model: nn.Module, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    one = nn.Linear(3, 2)
    first = torch.optim.AdamW(one.parameters(), fused=True)
    steps(first, one, 3)
    tensors = checkpoint.optimizer_tensors(first, dict(one.named_parameters()))
    other = nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    # the other way round: names decide, not positions
    second = torch.optim.AdamW(list(other.parameters())[::-1], fused=True)
    checkpoint.restore_optimizer(second, dict(other.named_parameters()), tensors)
    steps(first, one, 2)
    steps(second, other, 2)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_manifest_holds_digest_and_size(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == set(checkpoint.FILES)
    assert all(manifest[name]["size"] == (path / name).stat().st_size for name in manifest)
