"""A checkpoint is whole or is passed over; what comes back is what went in.

Kills and faults at every place of a save, and a thousand damages: tests/reliability/.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import DivergedError, InputError
from lorakit.training import checkpoint

NAN = float("nan")


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "adapter": {"unet.a.lora_A.weight": torch.full((2, 3), value)},
        "optimizer": {"unet.a.lora_A.weight.exp_avg": torch.arange(6.0).reshape(2, 3), "unet.q": torch.ones(2).byte()},
        "ema": {"unet.a.lora_A.weight": torch.full((2, 3), value, dtype=torch.float64)},
    }


def save(folder: Path, step: int, *, value: float | None = None) -> Path:
    content = tensors(float(step) if value is None else value)
    return checkpoint.save(folder, step, tensors=content, state={"step": step, "digest": "é"}, metadata={"k": "v"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 200)
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and skipped == []
    assert found.path.name == "step-000200" and found.state == {"step": 200, "digest": "é"}
    for name, part in tensors(200.0).items():
        assert found.tensors[name].keys() == part.keys()
        assert all(
            torch.equal(found.tensors[name][k], t) and found.tensors[name][k].dtype == t.dtype for k, t in part.items()
        )
    assert names(found.path) == [
        *("adapter.safetensors", "ema.safetensors", "manifest.json", "optimizer.safetensors", "state.json")
    ]


def test_a_run_without_an_average_has_no_file_for_it(tmp_path: Path) -> None:
    content = tensors(1.0)
    del content["ema"]
    path = checkpoint.save(tmp_path, 1, tensors=content, state={"step": 1})
    assert checkpoint.damage(path) is None and set(checkpoint.load(path).tensors) == {"adapter", "optimizer"}


def test_equal_content_gives_equal_bytes_and_a_manifest_of_all_but_itself(tmp_path: Path) -> None:
    one, two = save(tmp_path / "1", 7), save(tmp_path / "2", 7)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names(one))
    manifest = json.loads((one / "manifest.json").read_text())
    assert {*manifest, "manifest.json"} == set(names(one))
    assert all(manifest[name]["size"] == (one / name).stat().st_size for name in manifest)


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "manifest.json"
    good = file.read_bytes()
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x20]) + good[at + 1 :])
        assert checkpoint.damage(file.parent), at
    file.write_bytes(json.dumps(json.loads(good)).encode())
    assert "not as it was written" in (checkpoint.damage(file.parent) or "")
    for text in (b"", b"[]", b"{}", b"7", b"\xff", b"[" * 100_000, b'{"state.json": 1}'):
        file.write_bytes(text)
        assert checkpoint.damage(file.parent)


def test_the_reason_names_the_file_and_an_older_one_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    flip(second / "optimizer.safetensors")
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 1
    assert skipped == ["step-000002 is damaged: optimizer.safetensors has another content than its manifest says."]
    (second / "adapter.safetensors").unlink()
    assert checkpoint.damage(second) == "adapter.safetensors is missing"
    (second / "adapter.safetensors").mkdir()
    assert "adapter.safetensors" in (checkpoint.damage(second) or "")
    (second / "manifest.json").unlink()
    assert checkpoint.damage(second) == "manifest.json is missing"


def test_a_renamed_folder_and_a_foreign_file_are_seen_but_a_file_managers_is_not(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / ".DS_Store").touch()
    (path / "._adapter.safetensors").write_bytes(b"no tensors")
    assert checkpoint.damage(path) is None and set(checkpoint.load(path).tensors) == {"adapter", "optimizer", "ema"}
    path.rename(tmp_path / "step-000002")
    assert "it is of step 1" in (checkpoint.damage(tmp_path / "step-000002") or "")
    (tmp_path / "step-000002").rename(path)
    (path / "more.safetensors").touch()
    assert checkpoint.damage(path) == "more.safetensors does not belong there"


def test_none_that_verifies_is_an_error_and_none_at_all_is_not(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])
    flip(save(tmp_path, 1) / "adapter.safetensors")
    flip(save(tmp_path, 2) / "state.json")
    with pytest.raises(InputError) as caught:
        checkpoint.newest(tmp_path)
    assert [text.split()[0] for text in caught.value.problems] == ["step-000002", "step-000001", "No"]


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["adapter", "optimizer", "ema"])
def test_nothing_that_is_not_finite_is_written(tmp_path: Path, part: str, value: float) -> None:
    content = tensors(1.0)
    next(iter(content[part].values()))[1, 2] = value
    with pytest.raises(DivergedError, match=rf"{part}\.unet\.a\.lora_A\.weight"):
        checkpoint.save(tmp_path, 1, tensors=content, state={"step": 1})
    assert names(tmp_path) == []


@pytest.mark.parametrize("state", [{"d": NAN}, {"d": {"e": [1.0, NAN]}}, {"d": ({"e": NAN},)}])
def test_nor_in_the_state(tmp_path: Path, state: dict[str, object]) -> None:
    with pytest.raises(DivergedError, match=r"the first is state\.d"):
        checkpoint.save(tmp_path, 1, tensors=tensors(1.0), state={"step": 1, **state})
    assert names(tmp_path) == []


def test_a_step_saved_again_takes_the_place_of_the_old_one_and_of_all_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        flip(tmp_path / f"step-00000{step}" / "adapter.safetensors")  # so the run went on from step 1
    save(tmp_path, 2, value=0.5)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and not skipped and found.tensors["adapter"]["unet.a.lora_A.weight"].unique().item() == 0.5


def test_one_that_a_kill_left_beside_its_forerunner_counts(tmp_path: Path) -> None:
    """A kill between the removal of the old checkpoint of a step and the renaming of the new one."""
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-000002.again")
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None and found.path.name == "step-000002.again"
    save(tmp_path, 2, value=0.5)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    save(tmp_path, 2).rename(tmp_path / "step-000002.again")
    save(tmp_path, 2)
    flip(tmp_path / "step-000002" / "state.json")
    save(tmp_path, 2, value=0.25)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ({"keep_last": 0}, [5, 10, 15, 20, 100]),
        ({"keep_last": 0, "keep_every": 7, "keep": [5]}, [5, 10, 15, 20, 100]),
        ({"keep_last": 2}, [20, 100]),
        ({"keep_last": 9}, [5, 10, 15, 20, 100]),
        ({"keep_last": 1, "keep_every": 10}, [10, 20, 100]),
        ({"keep_last": 1, "keep": {5, 15, 999}}, [5, 15, 100]),
        ({"keep_last": 1, "keep_every": 20, "keep": [5]}, [5, 20, 100]),
    ],
)
def test_pruning_keeps_the_newest_the_lasting_and_the_best(
    tmp_path: Path, how: dict[str, int], left: list[int]
) -> None:
    for step in (5, 10, 15, 20, 100):
        save(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    checkpoint.prune(tmp_path, **how)  # type: ignore[arg-type]
    assert names(tmp_path) == [*(f"step-{step:06d}" for step in left), "step-final"]


def test_a_damaged_newer_one_does_not_push_out_the_good_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "step-000003" / "state.json")
    for step in (4, 5):
        save(tmp_path / "other", step)
    (tmp_path / "other" / "step-000005").rename(tmp_path / "step-000005")
    flip(tmp_path / "step-000005" / "state.json")
    save(tmp_path, 4)
    checkpoint.prune(tmp_path, keep_last=1)
    found, skipped = checkpoint.newest(tmp_path)
    assert found is not None and found.state["step"] == 4 and not skipped


def test_the_best_are_those_of_the_lowest_validation_loss_that_are_there(tmp_path: Path) -> None:
    assert checkpoint.best_steps(tmp_path / "validation.jsonl", tmp_path, 3) == []
    losses = {0: 0.1, 10: 0.5, 20: 0.3, 25: 0.01, 30: None, 40: 0.3, 50: 0.4}
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (tmp_path / "validation.jsonl").write_text("\n".join([*lines, '{"step": 60, "loss": NaN}', '{"st']))
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path / "c", step)
    best = [checkpoint.best_steps(tmp_path / "validation.jsonl", tmp_path / "c", count) for count in (0, 1, 3, 9)]
    assert best == [[], [20], [20, 40, 50], [20, 40, 50, 10]]
