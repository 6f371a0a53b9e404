"""Tags by score. onnxruntime need not be installed: a session with the same calls stands in for its own; where it is
installed, a test asks it itself."""

import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.captioning import check_settings, load_writers, validate_settings
from lorakit.captioning.pictures import Picture
from lorakit.captioning.tagger import Tag, Tagger, chosen, read_tags
from lorakit.core.errors import InputError

TAGS = [("general", 9), ("explicit", 9), ("1girl", 0), ("long_hair", 0), (">_<", 0), ("hatsune_miku_(vocaloid)", 4)]
TAGS += [("solo", 0), ("highres", 5), ("unknown_kind", 7)]
SCORES = [0.2, 0.7, 0.5, 0.9, 0.6, 0.9, 0.34, 0.99, 0.99]
HAS_RUNTIME = importlib.util.find_spec("onnxruntime") is not None


class Session:
    """As onnxruntime's: scores that are the means of a picture's colours, in the order in which they come."""

    def __init__(self, shape: tuple[Any, ...] = ("batch", 8, 8, 3), scores: int = 3) -> None:
        self.shape, self.scores, self.seen = shape, scores, []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="input", shape=list(self.shape))]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="output", shape=["batch", self.scores])]

    def run(self, names: None, given: dict[str, Any]) -> list[Any]:
        pixels = given["input"]
        assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
        self.seen.append(pixels)
        return [pixels.mean(axis=(1, 2)) / 255]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tagger"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"no model")
    rows = [f"{i},{name},{category},1" for i, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return folder


def settings(model: Path, **more: Any) -> Any:
    (made,) = validate_settings({"model": str(model), **more})
    return made


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "long hair, hatsune miku (vocaloid), >_<, 1girl"),
        ({"underscores": True}, "long_hair, hatsune_miku_(vocaloid), >_<, 1girl"),
        ({"thresholds": {"general": 0.55}}, "long hair, hatsune miku (vocaloid), >_<"),
        ({"thresholds": {"general": 1.0, "character": 0.95}}, ""),
        (
            {"thresholds": {"general": 0.3, "rating": 0.1}},
            "long hair, hatsune miku (vocaloid), explicit, >_<, 1girl, solo",
        ),
        ({"thresholds": {"meta": 0.5}}, "highres, long hair, hatsune miku (vocaloid), >_<, 1girl"),
        ({"exclude": ["*hair", "1GIRL"]}, "hatsune miku (vocaloid), >_<"),
        (
            {"exclude": ["long hair"], "rename": {"1girl": "a girl", "hatsune miku_(vocaloid)": "qzx"}},
            "qzx, >_<, a girl",
        ),
        ({"rename": {"1girl": "long hair"}}, "long hair, hatsune miku (vocaloid), >_<"),
        ({"order": "alphabet"}, "1girl, >_<, hatsune miku (vocaloid), long hair"),
        ({"order": "model"}, "1girl, long hair, >_<, hatsune miku (vocaloid)"),
        ({"first": ["1girl", "hatsune*"]}, "1girl, hatsune miku (vocaloid), long hair, >_<"),
        ({"max_tags": 2, "order": "model"}, "long hair, hatsune miku (vocaloid)"),
    ],
)
def test_which_tags_are_chosen_and_how_they_are_written(model: Path, more: dict[str, Any], text: str) -> None:
    assert ", ".join(chosen(read_tags(model / "selected_tags.csv"), SCORES, settings(model, **more))) == text


def picture(colour: tuple[int, int, int], size: tuple[int, int]) -> Picture:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return Picture("x", file.getvalue)


def test_pictures_reach_the_model_on_white_as_blue_green_red(model: Path) -> None:
    session = Session()
    tagger = Tagger(session, [Tag(name, "general") for name in ("b", "g", "r")], settings(model))
    bad = Picture("bad", lambda: b"no picture")
    outcomes = tagger([picture((255, 0, 0), (20, 20)), bad, picture((0, 128, 0), (20, 10))])
    assert outcomes[0] == ("r",) and isinstance(outcomes[1], ValueError) and outcomes[2] == ("g, b, r",)
    assert session.seen[0].shape == (2, 8, 8, 3) and session.seen[0].max() == 255
    assert np.allclose(session.seen[0][1, 0], 255) and np.allclose(session.seen[0][1, 4], [0, 128, 0], atol=4)
    assert Tagger(Session((1, 8, 8, 3)), [Tag("x", "general")] * 3, settings(model)).batch_size == 1


@pytest.mark.parametrize(
    ("session", "said"),
    [(Session(("batch", 3, 8, 8)), "as taggers do here"), (Session(scores=4), "they do not belong together")],
)
def test_models_of_another_make(model: Path, session: Session, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Tagger(session, [Tag("x", "general")] * 3, settings(model))


def test_what_is_missing_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = settings(model)
    (model / "model.onnx").unlink()
    with pytest.raises(InputError) as caught:
        check_settings([made])
    assert "lacks model.onnx" in str(caught.value) and 'pip install "lorakit[tagger]"' in str(caught.value)
    (model / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no table with columns name and category"):
        read_tags(model / "selected_tags.csv")


@pytest.mark.parametrize(("cuda", "first"), [(True, "CUDAExecutionProvider"), (False, "CPUExecutionProvider")])
def test_onnxruntime_is_asked_for_the_device_that_is_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, first: str
) -> None:
    """By a module that stands in for onnxruntime's, with the calls that are made of it."""
    asked: list[Any] = []

    def session(file: str, providers: list[Any]) -> Session:
        asked.extend([file, providers])
        return Session(scores=len(TAGS))

    runtime = SimpleNamespace(
        InferenceSession=session, get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    load_writers([settings(model)], root=Path(), device=torch.device("cuda:1" if cuda else "cpu"))
    assert asked[0] == str(model / "model.onnx")
    assert asked[1][0] == ((first, {"device_id": 1}) if cuda else first) and asked[1][-1] == "CPUExecutionProvider"


@pytest.mark.skipif(not HAS_RUNTIME, reason="onnxruntime is not installed")
def test_onnxruntime_itself_refuses_what_is_no_model(model: Path) -> None:
    with pytest.raises(InputError, match="could not be loaded"):
        load_writers([settings(model)], root=Path(), device=torch.device("cpu"))
