import io
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from lorakit.data.inspection import inspect_picture
from lorakit.data.similar import LOOK_BYTES, MAX_COLOUR_DISTANCE, MAX_DISTANCE, SURE_DISTANCE, alike, look
from tests.data.pictures import noise

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=quality)
    return data.getvalue()


def pairs_of(numbers: list[int]) -> dict[int, int]:
    data = b"".join(number.to_bytes(LOOK_BYTES, "big") for number in numbers)
    return dict(alike(np.frombuffer(data, dtype=np.uint8).reshape(-1, LOOK_BYTES)))


def pairs_of_hashes(numbers: list[int]) -> dict[int, int]:
    """Of looks in equal colours."""
    return pairs_of([number << 64 for number in numbers])


def smooth(seed: int) -> Image.Image:
    return noise(12, 12, seed).resize((240, 200), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: jpeg(i, 40),
        lambda i: jpeg(i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS)),
        lambda i: jpeg(ImageEnhance.Brightness(i.convert("RGB")).enhance(1.05)),
        lambda i: jpeg(ImageEnhance.Brightness(i.convert("RGB")).enhance(0.85)),
    ],
)
def test_copies_look_like_their_originals_and_others_do_not(change) -> None:
    originals = [smooth(seed) for seed in range(12)]
    if PHOTOS.is_dir():
        originals += [Image.open(path) for path in sorted(PHOTOS.glob("*/*.jpg"))]
    looks = [inspect_picture(jpeg(image, 95)).look for image in originals]
    assert pairs_of(looks) == {}
    copies = [inspect_picture(change(image)).look for image in originals]
    count = len(originals)
    assert pairs_of([*looks, *copies]) == {count + i: i for i in range(count)}


def test_different_photographs_are_far_apart() -> None:
    if not PHOTOS.is_dir():
        pytest.skip("../shared/photos is absent")
    looks = [inspect_picture(path.read_bytes()).look for path in sorted(PHOTOS.glob("*/*.jpg"))]
    nearest = min((a >> 64 ^ b >> 64).bit_count() for a, b in itertools.combinations(looks, 2))
    assert nearest >= 2 * MAX_DISTANCE


def test_plain_pictures_have_no_look() -> None:
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "#123456")]
    plain += [Image.new("L", (64, 64), 255), Image.new("RGBA", (64, 64)), noise(8, 8)]
    nearly = np.full((64, 64), 200, dtype=np.uint8)
    nearly[20:30, 20:30] = 199
    plain.append(Image.fromarray(nearly))
    spot = np.full((64, 64), 255, dtype=np.uint8)
    spot[30:34, 30:34] = 0  # a dot on white is like any other
    plain.append(Image.fromarray(spot))
    assert [look(image) for image in plain] == [0] * len(plain)
    assert pairs_of_hashes([0, 0, 0, 1, 1]) == {4: 3}


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "I"])
def test_every_mode_has_a_look(mode: str) -> None:
    image = smooth(3)
    if mode.startswith("I"):
        values = np.asarray(image.convert("L")).astype(np.uint16) * 257
        other = Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    else:
        other = image.convert(mode)
    assert (look(other) >> 64 ^ look(image) >> 64).bit_count() <= (MAX_DISTANCE if mode != "1" else 20)


def test_transparent_pictures_look_like_they_do_on_white() -> None:
    image = smooth(1).convert("RGBA")
    image.putalpha(smooth(2).convert("L"))
    white = Image.new("RGBA", image.size, "white")
    assert look(image) == look(Image.alpha_composite(white, image).convert("RGB"))


def test_drawings_of_one_outline_are_told_apart_by_their_colours() -> None:
    def drawing(ground: str, thing: str) -> Image.Image:
        image = Image.new("RGB", (64, 64), ground)
        image.paste(thing, (12, 18, 44, 50))
        image.paste("black", (40, 6, 58, 30))
        return image

    red, blue, ground = drawing("gray", "red"), drawing("gray", "blue"), drawing("white", "red")
    outlines = [look(image) >> 64 for image in (red, blue)]
    assert (outlines[0] ^ outlines[1]).bit_count() <= MAX_DISTANCE
    copies = [look(Image.open(io.BytesIO(jpeg(image, 60)))) for image in (red, blue, ground)]
    assert pairs_of([look(red), look(blue), look(ground), *copies]) == {3: 0, 4: 1, 5: 2}


def test_colours_may_differ_as_much_as_a_copys_do() -> None:
    word = int(noise(4, 4).tobytes()[:16].hex(), 16) << 64
    assert pairs_of([word, word + (MAX_COLOUR_DISTANCE << 16)]) == {1: 0}
    assert pairs_of([word, word + (MAX_COLOUR_DISTANCE + 1 << 16)]) == {}


BITS = st.sets(st.integers(0, 127), max_size=SURE_DISTANCE + 2)


@given(st.lists(st.integers(1, 2**128 - 1), min_size=1, max_size=5, unique=True), st.lists(BITS, max_size=4))
def test_whatever_has_a_near_one_is_found_and_no_other(words: list[int], changes: list[set[int]]) -> None:
    numbers = [*words, *(words[0] ^ sum(1 << bit for bit in bits) for bits in changes)]
    found = pairs_of_hashes(numbers)
    for j, b in enumerate(numbers):
        near = [(a ^ b).bit_count() for a in numbers[:j] if a and b]
        assert j in found or min(near, default=128) > SURE_DISTANCE
    assert all(i < j and (numbers[i] ^ numbers[j]).bit_count() <= MAX_DISTANCE for j, i in found.items())


@pytest.mark.parametrize("band", range(8))
def test_pairs_that_agree_in_one_stretch_alone_are_found(band: int) -> None:
    word = int(noise(4, 4).tobytes()[:16].hex(), 16)
    other = word ^ sum(1 << (16 * k + k) for k in range(8) if k != band)
    assert (word ^ other).bit_count() == SURE_DISTANCE
    assert pairs_of_hashes([word, 5 << 100, other]) == {2: 0}


def test_a_hundred_thousand_and_many_of_one_kind_take_seconds() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (100_000, LOOK_BYTES), dtype=np.uint8)
    looks[50_000:50_100] = looks[:100]
    looks[50_000:50_100, 3] ^= 1
    looks[60_000:70_000] = looks[60_000]  # frames of a film that stands still
    looks[:, 16:] = 0
    looks[70_000:80_000, :12] = looks[70_000, :12]  # and one that moves a little
    began = time.process_time()
    found = dict(alike(looks))
    assert time.process_time() - began < 20
    assert {50_000 + i: i for i in range(100)}.items() <= found.items()
    assert all(found[i] == 60_000 for i in range(60_001, 70_000))
