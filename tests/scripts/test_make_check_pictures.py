"""The pictures of the documentation are made from any folder of photographs, with or without a browser."""

from pathlib import Path

import make_check_pictures
import pytest
from PIL import Image

from tests.data.pictures import noise


def test_the_sheet_is_made_and_without_a_browser_that_is_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_check_pictures.shutil, "which", lambda name: None)
    for n, subject in enumerate(["dog"] * 4 + ["rc_car"] * 3 + ["vase"] * 3):
        (tmp_path / "photos" / subject).mkdir(parents=True, exist_ok=True)
        noise(800, 800, n).save(tmp_path / "photos" / subject / f"{n:02d}.jpg", quality=60)
    made = make_check_pictures.make(tmp_path / "photos", tmp_path / "out", originals=3)
    assert made == [tmp_path / "out" / "contact-sheet.png"] and Image.open(made[0]).width == make_check_pictures.WIDTH
