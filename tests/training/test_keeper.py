"""Who draws which picture of a run; what a run leaves behind is tested where runs are."""

from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.sampling.pictures import SampleSettings, requests
from lorakit.training import keeper
from lorakit.training.keeper import Keeper


@pytest.mark.parametrize("sharded", [False, True])
def test_each_rank_draws_its_share_of_the_pictures(sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = [[], []]
    place = {"rank": 0}

    def draw(pipeline: Any, wanted: Any, **how: Any) -> list[str]:
        drawn[place["rank"]] += [request.prompt for request in wanted]
        return [request.prompt for request in wanted]

    def on_each_rank(action: Any) -> list[Any]:
        return [place.update(rank=rank) or action() for rank in (0, 1)]

    monkeypatch.setattr(keeper, "world", lambda: 2)
    monkeypatch.setattr(keeper, "rank", lambda: place["rank"])
    monkeypatch.setattr(keeper, "draw", draw)
    monkeypatch.setattr(keeper, "on_each_rank", on_each_rank)
    wanted = requests(SampleSettings(prompts=["a", "b", "c"]))
    trainee = SimpleNamespace(family=SimpleNamespace(), sharded=sharded)
    this: Any = SimpleNamespace(trainee=trainee, interrupt=SimpleNamespace(pending=False))
    if not sharded:
        assert Keeper._drawn(this, None, wanted, {}) == ["a", "b", "c"]
        assert drawn == [["a", "c"], ["b"]]
        return
    for rank in (0, 1):  # what both say to each other: first whether to stop, at the end what they drew
        place["rank"] = rank
        monkeypatch.setattr(keeper, "gather_objects", lambda own: [own] if own is False else [["a", "c"], ["b", "c"]])
        assert Keeper._drawn(this, None, wanted, {}) == ["a", "b", "c"]
    assert drawn == [["a", "c"], ["b", "c"]], "equally many"
