"""The hardest pictures: like is compared with like, and what is rarely seen is not ranked for its luck."""

from typing import Any

import numpy as np
import pytest

from lorakit.training.hardest import hardest


def run(
    hardness: dict[str, float], *, steps: int = 400, fall: float = 1.0, seed: int = 0, width: int = 4
) -> list[dict[str, Any]]:
    """Records of a run whose losses are f(t) · g(step) · hardness, with much chance in them."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(1, steps + 1):
        keys = [str(key) for key in rng.choice(list(hardness), width)]
        t = rng.integers(0, 1000, width)
        chance = rng.lognormal(0, 0.3, width)
        loss = [(0.01 + (x / 1000) ** 3) * np.exp(-fall * step / steps) for x in t]
        losses = [a * hardness[key] * c for a, key, c in zip(loss, keys, chance, strict=True)]
        records.append({"step": step, "samples": keys, "timesteps": t.tolist(), "losses": losses})
    return records


def test_pictures_are_ranked_by_how_hard_they_are_and_not_by_their_timesteps() -> None:
    hardness = {"0/a.png": 1.0, "0/b.png": 2.0, "0/c.png": 1.5, **{f"0/{i}.png": 1.0 for i in range(9)}}
    found = hardest(run(hardness), count=3)
    assert [picture.key for picture in found[:2]] == ["0/b.png", "0/c.png"]
    assert found[0].loss / found[2].loss == pytest.approx(2.0, abs=0.35)
    assert sum(picture.seen for picture in hardest(run(hardness), count=99)) == 1600


def test_a_loss_is_compared_with_those_of_like_timesteps() -> None:
    """An easy picture that only comes where all lose much is not hard."""
    records = run({f"0/{i}.png": 1.0 for i in range(10)}, seed=1)
    for record in records:
        for i, key in enumerate(record["samples"]):
            if key == "0/0.png":
                t = 900 + record["timesteps"][i] // 10
                record["timesteps"][i] = t
                record["losses"][i] = (0.01 + (t / 1000) ** 3) * np.exp(-record["step"] / 400) * 0.5
    by_key = {picture.key: picture for picture in hardest(records, count=10)}
    assert list(by_key)[-1] == "0/0.png" and by_key["0/0.png"].loss < 0.8


def test_a_loss_is_compared_with_those_of_about_the_same_step() -> None:
    """A picture that comes only at the beginning of a run that learns fast is not hard."""
    records = run({f"0/{i}.png": 1.0 for i in range(10)}, fall=3.0, seed=2)
    for record in records[60:]:
        record["samples"] = [key.replace("0/0.png", "0/1.png") for key in record["samples"]]
    by_key = {picture.key: picture for picture in hardest(records, count=10)}
    assert by_key["0/0.png"].loss == pytest.approx(1.0, abs=0.25)


def test_what_is_rarely_seen_is_not_first_by_chance() -> None:
    records = run({"0/hard.png": 1.5, **{f"0/{i}.png": 1.0 for i in range(6)}}, seed=3)
    records.append({"step": 401, "samples": ["0/once.png"], "timesteps": [500], "losses": [0.28 * np.exp(-1)]})
    found = hardest(records, count=8)
    once = next(picture for picture in found if picture.key == "0/once.png")
    assert once.loss > found[0].loss and found[0].key == "0/hard.png" and once.seen == 1


def test_a_trend_goes_over_the_run() -> None:
    (picture,) = hardest(run({"0/a.png": 1.0}), count=1)
    steps = [step for step, _ in picture.trend]
    assert len(steps) == 12 and steps == sorted(steps) and 1 <= steps[0] < 40 and 360 < steps[-1] <= 400
    assert picture.loss == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "record", [{}, {"samples": ["0/a.png"]}, {"samples": ["0/a.png"], "losses": 3, "timesteps": 1}]
)
def test_lines_without_losses_say_nothing(record: dict[str, Any]) -> None:
    assert hardest([{"step": 1, **record}], count=3) == []
    whole = {"step": 2, "samples": ["0/a.png", "0/b.png"], "timesteps": [1.0, 2.0], "losses": [0.5, None]}
    assert [picture.key for picture in hardest([{"step": 1, **record}, whole], count=3)] == ["0/a.png"]
    zero = {"step": 3, "samples": ["0/b.png"], "timesteps": [1.0], "losses": [0.0]}
    assert [picture.loss for picture in hardest([zero], count=3)] == [1.0]
