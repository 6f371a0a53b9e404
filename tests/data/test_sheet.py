"""The contact sheet shows the very cut, frames it in the original, and chooses evenly."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorakit.data.buckets import Bucket
from lorakit.data.cut import Cut
from lorakit.data.sheet import (
    _FRAME,
    _fitted,
    _font,
    _shares,
    _wrapped,
    choose,
    contact_sheet,
    cut_at,
    frame,
    panels,
    thumbnail,
)
from tests.data.pictures import noise
from tests.data.standin import Held

SIZES = [(64, 64)] * 30 + [(96, 48)] * 6 + [(40, 100)] * 3


@pytest.fixture
def many() -> Held:
    return Held([noise(*size, seed=i) for i, size in enumerate(SIZES)])


def test_as_many_of_each_bucket_and_spread_over_it(many: Held) -> None:
    choice = choose(many, 12)
    assert len(choice.shown) == 12 and choice == choose(many, 12)
    assert sorted(Counter(shown.bucket for shown in choice.shown).values()) == [3, 4, 5]
    square = [shown.number for shown in choice.shown if shown.bucket == (64, 64)]
    assert square[0] < 5 and square[-1] > 24 and max(np.diff(square)) <= 7
    assert "12 pictures of 39, chosen evenly over the buckets" in choice.caption and "3 buckets" in choice.caption
    assert choose(many, 100).caption == "39 pictures · 3 buckets"


@given(sizes=st.lists(st.integers(1, 30), max_size=8), count=st.integers(0, 80))
def test_shares_are_even_and_none_has_more_than_there_is(sizes: list[int], count: int) -> None:
    shares = _shares(sizes, count)
    assert sum(shares) == min(count, sum(sizes)) and all(s <= n for s, n in zip(shares, sizes))
    full = [s for s, n in zip(shares, sizes) if s < n]
    assert not full or max(full) - min(full) <= 1
    assert all(s >= max(full) - 1 or s == n for s, n in zip(shares, sizes) if full)


@given(
    width=st.integers(30, 900),
    height=st.integers(30, 900),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    bucket=st.sampled_from([Bucket(64, 64), Bucket(96, 48), Bucket(48, 96)]),
)
def test_the_frame_has_the_bucket_s_shape_and_lies_within(
    width: int, height: int, x: float, y: float, bucket: Bucket
) -> None:
    left, top, right, bottom = frame((width, height), Cut(bucket, (x, y)))
    assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    # one side is whole, but for rounding; the other in the bucket's proportion
    assert max(right - left, bottom - top) == pytest.approx(1)
    shape = (right - left) * width / ((bottom - top) * height)
    assert shape == pytest.approx(bucket.width / bucket.height, rel=0.02)


def test_what_is_framed_is_what_is_trained_on() -> None:
    """A picture that is red at its left, and a crop that keeps the left: the right is dimmed."""
    image = Image.new("RGB", (200, 100), (20, 60, 240))
    image.paste((240, 30, 20), (0, 0, 100, 100))
    data = Held([image], anchor=(0.0, 0.5))
    data.buckets_of = lambda index: (Bucket(64, 64),)  # type: ignore[method-assign]
    shown = choose(data, 1).shown[0]
    found = panels(data, shown, side=200)
    assert found.original.size == (200, 100) and found.cut.size == (100, 100)
    assert np.asarray(found.cut)[:, :90].reshape(-1, 3).max(0).tolist() == [240, 30, 20]  # all but the border
    pixels = np.asarray(found.original)
    assert pixels[50, 50].tolist() == [240, 30, 20]  # within
    assert (pixels[50, 150] < 60).all() and np.ptp(pixels[50, 150]) == 0  # dimmed, grey
    assert pixels[50, 99].tolist() == list(_FRAME) and pixels[50, 0].tolist() == list(_FRAME)


def test_a_mask_is_tinted_where_it_leaves_out() -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    data = Held([Image.new("RGB", (64, 64), (10, 200, 10))], masks={0: mask})
    cut = np.asarray(panels(data, choose(data).shown[0]).cut)
    assert cut[30, 10].tolist() == [10, 200, 10]
    assert cut[30, 50, 0] > 100 and cut[30, 50, 2] > 80


@pytest.mark.parametrize(
    ("size", "bucket", "cut"),
    [
        ((900, 900), Bucket(64, 64), (240, 240)),
        ((900, 600), Bucket(72, 48), (240, 160)),
        ((600, 900), Bucket(48, 72), (213, 320)),
        ((300, 900), Bucket(64, 64), (240, 240)),  # as high as the original it would be too wide
        ((100, 100), Bucket(64, 64), (100, 100)),
        ((40, 40), Bucket(64, 64), (64, 64)),  # never smaller than it has to be
        ((900, 900), Bucket(512, 512), (240, 240)),
    ],
)
def test_a_cut_of_few_pixels_is_as_high_as_its_original(
    size: tuple[int, int], bucket: Bucket, cut: tuple[int, int]
) -> None:
    data = Held([noise(*size)])
    data.buckets_of = lambda index: (bucket,)  # type: ignore[method-assign]
    assert panels(data, choose(data).shown[0]).cut.size == cut


def test_small_pictures_are_not_enlarged_and_large_ones_fit(many: Held) -> None:
    assert panels(many, choose(many, 1).shown[0]).cut.size <= (64, 64)
    large = Held([noise(900, 900)], resolution=512)
    found = panels(large, choose(large).shown[0], side=100)
    assert found.original.size == found.cut.size == (100, 100)
    assert max(thumbnail(large, 0, side=40).size) == 40


def test_the_sheet_is_the_same_every_time_and_shows_no_more_than_asked(many: Held) -> None:
    done: list[int] = []
    sheet = contact_sheet(many, count=5, on_progress=done.append)
    assert len(done) == 5
    assert np.array_equal(np.asarray(sheet), np.asarray(contact_sheet(many, count=5)))
    assert sheet.height < contact_sheet(many, count=30).height
    # the very pixels of a cut are on it
    cut = np.asarray(panels(many, choose(many, 5).shown[0]).cut)
    pixels = np.asarray(sheet)
    places = np.argwhere((pixels[:, :, :] == cut[0, 0]).all(-1))
    height, width = cut.shape[:2]
    assert any(np.array_equal(pixels[y : y + height, x : x + width], cut) for y, x in places)


def test_odd_names_captions_and_roles_do_no_harm() -> None:
    data = Held(
        [noise(64, 64, seed=i) for i in range(4)],
        keys=["0/a\\n.png", "0/" + "long" * 200 + ".png", "0/\U0001f600.png", "0/漢.png"],
        captions=["", "word " * 3000, "w" * 5000, "\x1b[31mred\nline"],
        roles=["train", "validation", "regularization", "train"],
        extra_captions=("x",),
    )
    assert contact_sheet(data).width > 0
    assert contact_sheet(Held([])).width > 0
    extreme = Held([noise(2000, 5), noise(3, 900)])
    assert contact_sheet(extreme).width > 0


@given(st.text(max_size=300), st.integers(60, 500))
def test_text_is_never_wider_than_its_place(text: str, width: int) -> None:
    font = _font(14)
    lines = _wrapped(text, width, font)
    assert len(lines) <= 3 and all(font.getlength(line) <= width for line in lines)
    assert font.getlength(_fitted(text, width, font, end=True)) <= width
    if len(text) > 20 and text.isalpha() and font.getlength(text) > 3 * width:
        assert lines[-1].endswith("…")


def test_words_that_do_not_fit_are_said_to_be_missing() -> None:
    assert _wrapped("word " * 100, 200, _font(14))[-1].endswith("…")
    assert _wrapped("two words", 200, _font(14)) == ["two words"]


def test_the_cut_shown_is_the_one_of_the_bucket() -> None:
    data = Held([noise(100, 100)])
    both = (Bucket(64, 64), Bucket(32, 32))
    data.buckets_of = lambda index: both  # type: ignore[method-assign]
    assert [cut_at(data, shown).bucket for shown in choose(data).shown] == [(32, 32), (64, 64)]
    data.cuts_of = lambda index: (Cut(both[0]),)  # type: ignore[method-assign]
    assert cut_at(data, choose(data).shown[0]).bucket == (64, 64)
