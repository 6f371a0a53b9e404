import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lorakit.data.buckets import Bucket
from lorakit.data.images import BadImageError, CropInfo, crop_to, decode, pixels, upright_rgb
from tests.data.pictures import noise


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (24, 16))
    corners = {(0, 0): (255, 0, 0), (16, 0): (0, 255, 0), (0, 8): (0, 0, 255), (16, 8): (255, 255, 255)}
    for place, colour in corners.items():
        upright.paste(colour, (*place, place[0] + 8, place[1] + 8))
    stored = {  # how a camera held so stores it (EXIF 2.3, tag 0x0112: where row 0 and column 0 are seen)
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    file = saved(stored, kind, exif=exif, **options)
    assert decode(file).size == (24, 16)
    file.seek(0)
    assert np.abs(array(upright_rgb(file)) - array(upright)).max() <= (8 if kind == "JPEG" else 0)


def test_what_is_transparent_lies_on_white() -> None:
    colours = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    image = Image.new("RGBA", (3, 1))
    image.putdata(colours)
    expected = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert array(upright_rgb(saved(image)))[0].tolist() == expected
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert array(upright_rgb(saved(grey)))[0].tolist() == [[10, 10, 10], [255, 255, 255]]


def test_a_transparent_palette_colour_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert array(upright_rgb(saved(image, kind, transparency=0)))[0].tolist() == [[255, 255, 255], [0, 0, 200]]


def test_sixteen_bits_are_scaled_not_cut() -> None:
    values = np.array([[0, 257, 32768, 64879, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        rgb = array(upright_rgb(saved(Image.fromarray(values), kind)))
        assert rgb[0, :, 0].tolist() == [0, 1, 128, 252, 255]
        assert (rgb[..., 0] == rgb[..., 2]).all()


def test_cmyk_bilevel_and_grey() -> None:
    cmyk = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(array(upright_rgb(cmyk))[4, 4] - [255, 0, 0]).max() < 6
    assert array(upright_rgb(saved(Image.new("1", (1, 1), 1))))[0, 0].tolist() == [255, 255, 255]
    assert array(upright_rgb(saved(Image.new("L", (1, 1), 77))))[0, 0].tolist() == [77, 77, 77]


def test_floating_point_pixels_are_refused_by_name() -> None:
    with pytest.raises(BadImageError, match=r"mode F: save it as 8-bit RGB"):
        decode(saved(Image.new("F", (8, 8), 0.5), "TIFF"))


def test_colour_profiles_become_srgb_and_broken_ones_do_not_matter() -> None:
    grey = noise(8, 8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (array(upright_rgb(saved(grey, icc_profile=srgb))) == array(grey)).all()
    assert (array(upright_rgb(saved(grey, icc_profile=b"no profile"))) == array(grey)).all()
    # the same primaries swapped: what is stored as red is meant as green
    count = struct.unpack(">I", srgb[128:132])[0]
    entry = {srgb[o : o + 4]: srgb[o + 4 : o + 12] for o in range(132, 132 + 12 * count, 12)}
    red, green = entry[b"rXYZ"], entry[b"gXYZ"]
    swapped = srgb.replace(b"rXYZ" + red, b"rXYZ" + b"." * 8).replace(b"gXYZ" + green, b"gXYZ" + red)
    swapped = swapped.replace(b"rXYZ" + b"." * 8, b"rXYZ" + green)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    red_picture = Image.new("RGB", (4, 4), (255, 0, 0))
    assert array(upright_rgb(saved(red_picture, icc_profile=swapped)))[0, 0].tolist() == [0, 255, 0]


def test_damage_is_found_wherever_the_file_ends() -> None:
    whole = saved(noise(64, 64), "JPEG").getvalue()
    for part in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(BadImageError):
            decode(io.BytesIO(whole[: int(len(whole) * part)]))
    for kind in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        whole = saved(noise(64, 64), kind).getvalue()
        with pytest.raises(BadImageError):
            decode(io.BytesIO(whole[: len(whole) // 2]))


def test_a_format_outside_the_list_is_refused() -> None:
    with pytest.raises(BadImageError, match="no picture of a known format"):
        decode(saved(noise(8, 8), "PPM"))


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_from_its_header(
    monkeypatch: pytest.MonkeyPatch, pillows_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)  # other libraries switch it off

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10**6))), chunk(b"IEND", b"")
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    began = time.process_time()
    with pytest.raises(BadImageError, match="million pixels"):
        decode(io.BytesIO(bomb))
    assert time.process_time() - began < 0.5


def test_the_crop_is_in_the_middle_and_says_where() -> None:
    cut, info = crop_to(noise(200, 100), Bucket(64, 64))
    assert cut.size == (64, 64)
    assert info == CropInfo((200, 100), 32, 0)
    tall, info = crop_to(noise(100, 201), Bucket(64, 64))
    assert tall.size == (64, 64)
    assert info == CropInfo((100, 201), 0, 32)
    same = noise(64, 64)
    assert crop_to(same, Bucket(64, 64)) == (same, CropInfo((64, 64), 0, 0))


def test_cropping_before_resizing_gives_the_pixels_of_resizing_before_cropping() -> None:
    base = np.stack(np.meshgrid(np.linspace(0, 255, 331), np.linspace(255, 0, 217)), -1).sum(-1) / 2
    image = Image.fromarray(base.astype(np.uint8)).convert("RGB")
    cut, info = crop_to(image, Bucket(64, 64))
    scale = 64 / 217
    whole = image.resize((round(331 * scale), 64), Image.Resampling.LANCZOS)
    plain = whole.crop((info.left, info.top, info.left + 64, info.top + 64))
    assert np.abs(array(cut) - array(plain)).max() <= 1


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    x = pixels(image)
    assert x.shape == (3, 2, 3)
    assert x.dtype == torch.float32
    assert x[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
