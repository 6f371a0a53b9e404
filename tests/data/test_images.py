import io
import math
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from lorakit.data import images, resize
from lorakit.data.buckets import Bucket
from lorakit.data.formats import formats, jxl_size, plugin_for, suffixes
from lorakit.data.images import BadImageError, CropInfo, Cut, Prepared, crop_info, decode, pixels, prepare_picture
from tests.data.pictures import noise


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def shown(prepared: Prepared) -> Image.Image:
    """The picture as 8-bit RGB again."""
    return Image.fromarray(((prepared.pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy())


def upright_rgb(file: io.BytesIO) -> Image.Image:
    """The picture at its own size."""
    return shown(prepare_picture(file.getvalue(), Cut(Bucket(*decode(file).size))))


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
    red_picture = Image.new("RGB", (4, 4), (255, 0, 0))
    assert array(upright_rgb(saved(red_picture, icc_profile=swapped_profile())))[0, 0].tolist() == [0, 255, 0]


def swapped_profile() -> bytes:
    """sRGB with two primaries swapped: what is stored as red is meant as green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = struct.unpack(">I", srgb[128:132])[0]
    entry = {srgb[o : o + 4]: srgb[o + 4 : o + 12] for o in range(132, 132 + 12 * count, 12)}
    red, green = entry[b"rXYZ"], entry[b"gXYZ"]
    swapped = srgb.replace(b"rXYZ" + red, b"rXYZ" + b"." * 8).replace(b"gXYZ" + green, b"gXYZ" + red)
    swapped = swapped.replace(b"rXYZ" + b"." * 8, b"rXYZ" + green)
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


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


def bombs() -> dict[str, bytes]:
    """Headers that promise huge pictures, from small ones whose size was written over."""
    side = 50_000
    found = {}
    gif = bytearray(saved(noise(8, 8), "GIF").getvalue())
    gif[6:10] = struct.pack("<HH", side, side)
    found["GIF"] = bytes(gif)
    bmp = bytearray(saved(noise(8, 8), "BMP").getvalue())
    bmp[18:26] = struct.pack("<ii", side, side)
    found["BMP"] = bytes(bmp)
    tiff = bytearray(saved(noise(8, 8), "TIFF").getvalue())
    start = struct.unpack("<I", tiff[4:8])[0]
    for entry in range(struct.unpack("<H", tiff[start : start + 2])[0]):
        at = start + 2 + 12 * entry
        if struct.unpack("<H", tiff[at : at + 2])[0] in (256, 257):
            tiff[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side)
    found["TIFF"] = bytes(tiff)
    jpeg = bytearray(saved(noise(8, 8), "JPEG").getvalue())
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", side, side)
    found["JPEG"] = bytes(jpeg)
    webp = bytearray(saved(noise(8, 8), "WEBP", exif=b"Exif\0\0II*\0\0\0\0\0").getvalue())
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16_382).to_bytes(3, "little") * 2  # WebP's own limit is 16,383
    found["WEBP"] = bytes(webp)
    if "AVIF" in formats():
        avif = bytearray(saved(noise(64, 64), "AVIF").getvalue())
        extent = avif.index(b"ispe") + 8
        avif[extent : extent + 8] = struct.pack(">II", 16_000, 16_000)
        found["AVIF"] = bytes(avif)
    return found


@pytest.mark.parametrize("kind", sorted(bombs()))
def test_bombs_of_every_format_are_refused_from_their_headers(kind: str) -> None:
    began = time.process_time()
    with pytest.raises(BadImageError):
        decode(io.BytesIO(bombs()[kind]))
    assert time.process_time() - began < 1.0


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Like a photograph: smooth, with some detail, no two corners alike."""
    return noise(24, 24, seed).resize((width, height), Image.Resampling.BICUBIC)


def cut_of(image: Image.Image, cut: Cut, **options: object) -> Prepared:
    return prepare_picture(saved(image).getvalue(), cut, **options)


def test_the_crop_is_in_the_middle_and_says_where() -> None:
    wide = cut_of(noise(200, 100), Cut(Bucket(64, 64)))
    assert wide.pixels.shape == (3, 64, 64)
    assert wide.info == CropInfo((200, 100), 32, 0) == crop_info((200, 100), Cut(Bucket(64, 64)))
    tall = cut_of(noise(100, 201), Cut(Bucket(48, 64)))
    assert tall.pixels.shape == (3, 64, 48)
    assert tall.info == CropInfo((100, 201), 0, 16)
    same = noise(64, 64)
    prepared = cut_of(same, Cut(Bucket(64, 64)))
    assert (array(shown(prepared)) == array(same)).all() and prepared.info == CropInfo((64, 64), 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("anchor", [(0.0, 0.0), (0.5, 0.5), (0.3, 0.3), (1.0, 1.0)])
def test_a_cut_is_what_resizing_all_and_cropping_gives(mode: str, anchor: tuple[float, float]) -> None:
    image = photo(331, 217).convert(mode)
    cut = Cut(Bucket(64, 64), anchor)
    prepared = prepare_picture(saved(image, "TIFF").getvalue(), cut)
    whole = image.resize((98, 64), Image.Resampling.LANCZOS).convert("RGB")
    left = math.floor(34 * anchor[0])
    assert prepared.info.left == left
    assert np.abs(array(shown(prepared)) - array(whole.crop((left, 0, left + 64, 64)))).max() <= 2


def test_without_torchs_lanczos_pillow_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, cut = photo(331, 217), Cut(Bucket(64, 48), (0.2, 0.9))
    fast = cut_of(image, cut)
    assert resize._torch_knows_lanczos() == ("lanczos" in (torch.nn.functional.interpolate.__doc__ or ""))
    monkeypatch.setattr(resize, "_torch_knows_lanczos", lambda: False)
    slow = cut_of(image, cut)
    assert np.abs(array(shown(fast)) - array(shown(slow))).max() <= 1


@given(
    st.tuples(st.integers(20, 300), st.integers(20, 300)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from([(), (1.2, 0.8, 1.3, 0.1)]),
)
@settings(max_examples=25)
def test_a_flipped_cut_is_the_mirror_image_of_the_other(
    size: tuple[int, int], anchor: tuple[float, float], jitter: tuple[float, ...]
) -> None:
    data, cut = saved(photo(*size)).getvalue(), Cut(Bucket(48, 40), anchor, jitter=jitter)
    mask = saved(photo(*size, 1).convert("L")).getvalue()
    plain, flipped = (prepare_picture(data, cut._replace(flip=flip), mask=mask) for flip in (False, True))
    assert torch.equal(flipped.pixels, plain.pixels.flip(2))
    assert torch.equal(flipped.mask, plain.mask.flip(2))
    scale = max(48 / size[0], 40 / size[1])
    slack = max(48, round(size[0] * scale)) - 48
    assert plain.info.left + flipped.info.left == slack and plain.info.top == flipped.info.top


def at_both_sizes(data: bytes, cut: Cut) -> list[Prepared]:
    """Decoded no larger than needed, and as a whole."""
    found = []
    for margin in (4, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "_DRAFT_MARGIN", margin)
            found.append(prepare_picture(data, cut))
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1024, 1536), (1021, 1531), (1530, 1017)])
def test_a_jpeg_decoded_smaller_is_cut_at_the_same_place(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(*size), "JPEG", exif=exif, quality=95).getvalue()
    cut = Cut(Bucket(32, 24), (0.9, 0.1))
    drafted = images.decode_for(io.BytesIO(data), lambda size: (size[0] // 4, size[1] // 4))
    assert drafted.image.width <= math.ceil(decode(io.BytesIO(data)).width / 4)
    assert drafted.size == decode(io.BytesIO(data)).size
    small, whole = at_both_sizes(data, cut)
    assert small.info == whole.info
    assert (small.pixels - whole.pixels).abs().mean() * 127.5 < 0.5
    assert not torch.equal(small.pixels, whole.pixels), "it was decoded smaller"


def test_a_drafted_picture_lies_in_its_box() -> None:
    # 1001 pixels at an eighth are 126, of which the last is one pixel's worth
    for orientation, box in {
        1: (0, 0, 125.125, 90.125),
        2: (0.875, 0, 126, 90.125),
        3: (0.875, 0.875, 126, 91),
        4: (0, 0.875, 125.125, 91),
        5: (0, 0, 90.125, 125.125),
        6: (0.875, 0, 91, 125.125),
        7: (0.875, 0.875, 91, 126),
        8: (0, 0.875, 90.125, 126),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(photo(1001, 721), "JPEG", exif=exif).getvalue()
        drafted = images.decode_for(io.BytesIO(data), lambda size: (size[0] // 8, size[1] // 8))
        assert drafted.box == pytest.approx(box)
        assert drafted.size == ((1001, 721) if orientation < 5 else (721, 1001))


def test_colour_profiles_and_inks_survive_being_decoded_smaller() -> None:
    for mode, options in (("CMYK", {}), ("L", {}), ("RGB", {"icc_profile": swapped_profile()})):
        data = saved(photo(1600, 1600).convert(mode), "JPEG", quality=95, **options).getvalue()
        small, whole = at_both_sizes(data, Cut(Bucket(32, 32)))
        assert 0 < (small.pixels - whole.pixels).abs().mean() * 127.5 < 0.5


def test_what_is_transparent_lies_on_the_cuts_background_or_is_the_mask() -> None:
    image = Image.new("RGBA", (40, 20), (200, 100, 0, 255))
    image.paste((0, 200, 100, 0), (20, 0, 40, 20))
    cut = Cut(Bucket(40, 20), background="#102030")
    composited = cut_of(image, cut)
    assert composited.mask is None
    assert array(shown(composited))[10, [5, 35]].tolist() == [[200, 100, 0], [16, 32, 48]]
    own = cut_of(image, cut, alpha_mask=True)
    assert array(shown(own))[10, [5, 35]].tolist() == [[200, 100, 0], [0, 200, 100]]
    assert own.mask is not None and own.mask.shape == (1, 20, 40)
    assert own.mask[0, 10, [5, 35]].tolist() == [1.0, 0.0]
    half = cut_of(image, cut._replace(bucket=Bucket(20, 10)), alpha_mask=True)
    assert array(shown(half))[5, [2, 17]].tolist() == [[200, 100, 0], [0, 200, 100]], "resized apart from its alpha"
    assert cut_of(image.convert("RGB"), cut, alpha_mask=True).mask is None


def test_a_mask_is_cut_where_its_picture_is() -> None:
    image = Image.new("RGB", (120, 80), (0, 0, 0))
    image.paste((255, 255, 255), (70, 20, 100, 60))
    for anchor in ((0.0, 0.0), (0.7, 0.5), (1.0, 1.0)):
        for size in ((120, 80), (60, 40), (240, 160)):
            mask = saved(image.convert("L").resize(size)).getvalue()
            prepared = cut_of(image, Cut(Bucket(32, 40), anchor, flip=anchor[0] == 1), mask=mask)
            assert prepared.mask is not None
            light = (prepared.pixels[:1] + 1) / 2
            assert (prepared.mask - light).abs().mean() < 0.04
            assert prepared.mask.min() >= 0 and prepared.mask.max() <= 1


def test_a_mask_is_turned_by_its_own_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.new("L", (16, 24), 0)
    upright.paste(255, (0, 0, 16, 12))
    mask = saved(upright.transpose(Image.Transpose.ROTATE_90), exif=exif).getvalue()
    prepared = cut_of(noise(16, 24), Cut(Bucket(16, 24)), mask=mask)
    assert prepared.mask is not None
    assert prepared.mask[0, :, 3].tolist() == [1.0] * 12 + [0.0] * 12


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "P", "RGBA", "LA"])
def test_masks_of_any_mode_say_how_light_they_are(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 65535]], np.uint16))
    elif mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 1), (255, 255) if mode == "LA" else (255,) * 4)
        image.putpixel((0, 0), (255, 0) if mode == "LA" else (255, 255, 255, 0))
    else:
        image = Image.new("L", (2, 1), 0)
        image.putpixel((1, 0), 255)
        image = image.convert(mode)
    prepared = cut_of(noise(2, 1), Cut(Bucket(2, 1)), mask=saved(image).getvalue())
    assert prepared.mask is not None
    assert prepared.mask[0, 0].tolist() == [0.0, 1.0]


def test_a_bad_mask_is_said_to_be_the_mask() -> None:
    with pytest.raises(BadImageError, match="^its mask: it is no picture"):
        cut_of(noise(8, 8), Cut(Bucket(8, 8)), mask=b"no picture")


def test_pooling_a_mask_takes_the_mean_of_each_cell() -> None:
    mask = torch.rand(1, 24, 16, generator=torch.Generator().manual_seed(0))
    pooled = images.pool_mask(mask, (3, 2))
    assert pooled.shape == (1, 3, 2)
    assert torch.allclose(pooled[0, 1, 1], mask[0, 8:16, 8:16].mean())
    assert torch.allclose(pooled.mean(), mask.mean())


def test_jitter_does_to_colours_what_it_says() -> None:
    grey, red = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (200, 0, 0))

    def colour(image: Image.Image, *jitter: float) -> list[int]:
        return array(shown(cut_of(image, Cut(Bucket(8, 8), jitter=jitter))))[0, 0].tolist()

    assert colour(grey, 1, 1, 1, 0) == [100, 100, 100]
    assert colour(grey, 1.5, 1, 1, 0) == [150, 150, 150]
    assert colour(grey, 1, 1, 1.5, 0.3) == [100, 100, 100], "grey has no hue"
    assert colour(red, 1, 1, 1, 1 / 3) == pytest.approx([0, 200, 0], abs=6)
    assert colour(red, 1, 1, 1, -1 / 3) == pytest.approx([0, 0, 200], abs=6)
    assert np.ptp(colour(red, 1, 1, 0.5, 0)) == pytest.approx(100, abs=2)
    spread = cut_of(noise(8, 8), Cut(Bucket(8, 8), jitter=(1, 0.5, 1, 0))).pixels.std()
    assert spread < 0.7 * cut_of(noise(8, 8), Cut(Bucket(8, 8))).pixels.std()


def test_an_inverted_cmyk_jpeg_of_adobes_kind() -> None:
    plain = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95).getvalue()
    assert b"Adobe" in plain, "Pillow writes Adobe's marker and inverts, as Photoshop does"
    assert np.abs(array(upright_rgb(io.BytesIO(plain)))[4, 4] - [255, 0, 0]).max() < 6


def test_a_moving_picture_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        file = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert array(upright_rgb(file))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.skipif("AVIF" not in formats(), reason="Pillow was built without AVIF")
def test_avif_is_read_upright_and_refused_where_it_is_cut_off() -> None:
    image = photo(48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(
        image.transpose(Image.Transpose.ROTATE_90), "AVIF", quality=95, subsampling="4:4:4", exif=exif
    ).getvalue()
    read = upright_rgb(io.BytesIO(data))
    assert read.size == (48, 32)
    assert np.abs(array(read) - array(image)).mean() < 4
    assert ".avif" in suffixes() and plugin_for(".avif") is None
    with pytest.raises(BadImageError):
        decode(io.BytesIO(data[: len(data) // 2]))


# the first bytes of files that libjxl wrote
@pytest.mark.parametrize(
    ("size", "head"),
    [
        ((64, 48), "ff0acb060013080100ec0067"),
        ((1000, 777), "ff0a4218e87c0c0013080100"),
        ((13, 400), "ff0a780c180c0013080100ac"),
        ((4032, 3024), "ff0a7a5e1b00130801006c00"),
        ((9000, 10), "ff0a48004f46180013080100"),
        ((14_000, 14_000), "ff0a7cb5210300130801006c"),
        (
            (64, 48),
            "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20000000106a786c7000000000ff0acb06000000124578"
            "696649492a00",
        ),
        (None, "ff0a"),
        (None, "0000000c4a584c200d0a870a00000000"),
        (None, "ffd8ffe000104a46494600010101"),
    ],
)
def test_the_size_of_a_jxl_is_read_from_its_header(size: tuple[int, int] | None, head: str) -> None:
    file = io.BytesIO(bytes.fromhex(head))
    assert jxl_size(file) == size
    assert file.tell() == 0
    if size == (14_000, 14_000):
        with pytest.raises(BadImageError, match="million pixels"):
            decode(file)


def test_a_plugin_that_is_installed_is_made_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    (tmp_path / "pillow_heif.py").write_text(
        f"def register_heif_opener():\n    with open({str(calls)!r}, 'a') as file:\n        file.write('once ')\n"
    )
    (tmp_path / "pillow_jxl.py").write_text("raise ImportError('built for another Pillow')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for function in (formats, suffixes):
        function.cache_clear()
    try:
        assert formats()["HEIF"] == (".heic", ".heif") and "JXL" not in formats()
        assert ".heic" in suffixes() and plugin_for(".heic") is None and plugin_for(".jxl") == "pillow-jxl-plugin"
        assert calls.read_text() == "once "
    finally:
        for name in ("pillow_heif", "pillow_jxl"):
            sys.modules.pop(name, None)
        for function in (formats, suffixes):
            function.cache_clear()


def test_the_plugin_for_a_format_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (formats, suffixes):
        function.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    try:
        assert set(formats()) == {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"}
        assert plugin_for(".heic") == "pillow-heif" and plugin_for(".avif") == "pillow-avif-plugin"
        assert plugin_for(".jpg") is None and plugin_for(".psd") is None
    finally:
        for function in (formats, suffixes):
            function.cache_clear()


def test_pixels_run_from_minus_one_to_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    x = pixels(image)
    assert x.shape == (3, 2, 3)
    assert x.dtype == torch.float32
    assert x[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
