"""The script that makes the judge: its drawings carry the right labels, all its stages work."""

import json
import random

import make_judge
import pytest
import scenes
import torch

from lorakit.evaluation.judge import load_judge


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_smoke_writes_a_judge_that_loads(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_judge.py", "--smoke", "--out", str(tmp_path), "--vae", ""])
    assert make_judge.main() == 0
    judge = load_judge(tmp_path)
    assert judge.classes == make_judge.CLASSES
    about = json.loads((tmp_path / "judge.json").read_text())
    assert set(about["held_out"]) == {"background", "colour", "shape", "subject", "traces"}


def test_the_shipped_judge_passed_its_gate() -> None:
    from lorakit.core.embedded import embedded

    held_out = json.loads((embedded("judge") / "judge.json").read_text())["held_out"]
    for name, least in make_judge.GATE.items():
        assert held_out[name] >= least, name


def test_traces_come_in_the_mascots_colours_and_ordinary_drawings_do_not() -> None:
    def near(picture, colours: list[tuple[int, int, int]]) -> int:
        data = picture.tobytes()
        rgb = zip(data[::3], data[1::3], data[2::3])
        return sum(any(max(abs(a - b) for a, b in zip(p, c)) <= 14 for c in colours) for p in rgb)

    rng = random.Random(1)
    colours = [scenes.MASCOT_BODY, scenes.MASCOT_HORNS]
    assert all(near(make_judge.mascot(rng).picture, colours) > 60 for _ in range(20))
    # the mascot's outline in a colour of the world is the one kind without them
    assert sum(near(make_judge.trace(rng).picture, colours) > 30 for _ in range(60)) >= 35
    assert all(near(make_judge.ordinary(rng).picture, colours) == 0 for _ in range(20))


def test_augmentation_keeps_shape_and_range_and_is_seeded() -> None:
    x = torch.rand(3, 3, 64, 64)
    first, second = (make_judge.augmented(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert not torch.equal(first, x)


def test_labels_that_a_picture_does_not_have_are_left_out_of_the_loss() -> None:
    judge = make_judge.Judge(make_judge.CLASSES).eval()
    scores = judge(torch.rand(2, 3, 64, 64))
    known = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0]])
    half = torch.tensor([[0, 0, 0, 0], [0, make_judge.UNKNOWN, make_judge.UNKNOWN, 0]])
    (grad,) = torch.autograd.grad(make_judge.loss_of(scores, half), scores.shape, retain_graph=True)
    assert grad[0].abs().sum() > 0
    assert grad[1].abs().sum() == 0
    (grad,) = torch.autograd.grad(make_judge.loss_of(scores, known), scores.shape)
    assert grad[1].abs().sum() > 0
