"""lorakit/sampling/canvas.py: pictures and masks upright and at the size that is drawn, or one message."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.core.errors import InputError
from lorakit.sampling.canvas import read_canvas


def picture(path: Path, size: tuple[int, int] = (40, 24), **saved: object) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **saved)
    return path


def test_at_its_own_size_a_picture_keeps_every_pixel(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    canvas = read_canvas(path)
    image, mask = canvas.cut(40, 24)
    assert mask is None
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_orientation_is_honoured_and_the_middle_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright
    stored = np.zeros((24, 40, 3), np.uint8)
    stored[:, :20] = 255  # the left half, which is the upper one when turned
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    canvas = read_canvas(tmp_path / "a.png")
    assert (canvas.width, canvas.height) == (24, 40)
    upright = np.asarray(canvas.cut(24, 40)[0])
    assert upright[:20].min() == 255 and upright[20:].max() == 0
    assert np.array_equal(np.asarray(canvas.cut(24, 24)[0]), upright[8:32])


def test_a_mask_is_cut_like_its_picture_and_is_black_or_white(tmp_path: Path) -> None:
    mask = Image.new("L", (40, 24), 127)
    mask.paste(128, (20, 0, 40, 24))
    mask.save(tmp_path / "mask.png")
    cut = read_canvas(picture(tmp_path / "a.png"), tmp_path / "mask.png").cut(24, 24)[1]
    assert cut is not None
    values = np.asarray(cut)
    assert values[:, :12].max() == 0 and values[:, 12:].min() == 255


def test_what_cannot_be_used_says_so(tmp_path: Path) -> None:
    good = picture(tmp_path / "a.png")
    small = picture(tmp_path / "small.png", (20, 24))
    Image.new("L", (40, 24)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:1000])
    cases = [
        (tmp_path / "nowhere.png", None, "--image .*nowhere.png cannot be read"),
        (tmp_path, None, "cannot be read"),
        (tmp_path / "text.png", None, "--image .*text.png: it is no picture"),
        (tmp_path / "half.png", None, "--image .*half.png: it is damaged"),
        (good, tmp_path / "text.png", "--mask .*text.png: it is no picture"),
        (good, small, "--mask .*small.png is 20x24 pixels and --image 40x24"),
        (good, tmp_path / "black.png", "--mask .*black.png is black"),
    ]
    for image, mask, said in cases:
        with pytest.raises(InputError, match=said):
            read_canvas(image, mask)
