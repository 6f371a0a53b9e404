import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import InputError
from lorakit.data.buckets import AREA_TOLERANCE, BucketSettings, assign, crop_fraction, make_buckets, upscale

FITTING = [(64, 4), (256, 8), (512, 8), (512, 64), (768, 8), (1024, 8), (1024, 16), (1024, 64)]


@pytest.mark.parametrize(("resolution", "multiple"), FITTING)
def test_sides_areas_and_aspects(resolution: int, multiple: int) -> None:
    buckets = make_buckets(BucketSettings(resolution=resolution), side_multiple=multiple)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets) > 8
    for width, height in buckets:
        assert width % multiple == 0
        assert height % multiple == 0
        assert abs(width * height / resolution**2 - 1) <= AREA_TOLERANCE
        assert 1 / 3 <= width / height <= 3
        assert (height, width) in buckets


@pytest.mark.parametrize(("resolution", "multiple"), [pair for pair in FITTING if pair != (512, 64)])
def test_no_picture_within_the_aspects_is_cropped_by_more_than_max_crop(resolution: int, multiple: int) -> None:
    for max_crop in (0.05, 0.1):
        settings = BucketSettings(resolution=resolution, max_crop=max_crop)
        buckets = make_buckets(settings, side_multiple=multiple)
        sizes = [(round(1e6 * math.exp(x / 100)), 1_000_000) for x in range(-109, 110)]
        assert max(crop_fraction(size, assign(size, buckets)) for size in sizes) <= max_crop


def test_fewer_buckets_where_more_may_be_cropped() -> None:
    counts = [len(make_buckets(BucketSettings(max_crop=crop), side_multiple=8)) for crop in (0.02, 0.05, 0.2)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3


def test_common_aspects_lose_next_to_nothing() -> None:
    buckets = make_buckets(BucketSettings(), side_multiple=8)
    for size in [(4000, 3000), (3000, 4000), (6000, 4000), (1920, 1080), (1080, 1920), (700, 700)]:
        assert crop_fraction(size, assign(size, buckets)) < 0.01


def test_the_frames_that_the_embedded_base_was_trained_at() -> None:
    buckets = make_buckets(BucketSettings(resolution=64), side_multiple=4)
    assert {(64, 64), (80, 52), (52, 80), (72, 56), (56, 72)} <= set(buckets)


def test_a_multiple_that_leaves_only_the_square() -> None:
    assert make_buckets(BucketSettings(resolution=64), side_multiple=64) == [(64, 64)]


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_assignment_is_nearest_in_log_aspect_and_mirrors(width: int, height: int) -> None:
    buckets = make_buckets(BucketSettings(resolution=64), side_multiple=4)
    chosen = assign((width, height), buckets)
    assert crop_fraction((width, height), chosen) == min(crop_fraction((width, height), b) for b in buckets)
    mirrored = assign((height, width), buckets)
    assert math.isclose(crop_fraction((width, height), chosen), crop_fraction((height, width), mirrored), abs_tol=1e-12)


def test_crop_and_upscale_by_hand() -> None:
    bucket = assign((200, 100), make_buckets(BucketSettings(resolution=64, max_aspect=1.0), side_multiple=4))
    assert bucket == (64, 64)
    assert crop_fraction((200, 100), bucket) == pytest.approx(0.25)  # 200 → 100: fifty pixels at either side
    assert upscale((200, 100), bucket) == pytest.approx(0.64)
    assert upscale((32, 100), bucket) == 2.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (BucketSettings(resolution=510), ["data.buckets.resolution = 510", "504 or 512"]),
        (BucketSettings(multiple=12), ["data.buckets.multiple = 12", "16"]),
        (BucketSettings(multiple=24), ["data.buckets.resolution = 512", "24", "504 or 528"]),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(settings: BucketSettings, said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make_buckets(settings, side_multiple=8)
    assert all(text in str(error.value) for text in said)
