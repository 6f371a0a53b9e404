import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.data.buckets import (
    AREA_TOLERANCE,
    Bucket,
    BucketSettings,
    assign,
    bucket_ids,
    by_resolution,
    crop_fraction,
    fitting,
    make_buckets,
    size_problem,
    upscale,
)

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


SEVERAL = make_buckets(BucketSettings(resolution=[768, 256, 512]), side_multiple=8)


def test_several_resolutions_have_their_own_buckets_the_smallest_first() -> None:
    alone = [make_buckets(BucketSettings(resolution=side), side_multiple=8) for side in (256, 512, 768)]
    assert [bucket for buckets in alone for bucket in buckets] == SEVERAL
    assert [[SEVERAL[i] for i in part] for part in by_resolution(SEVERAL)] == alone
    squares = make_buckets(BucketSettings(resolution=[64, 128], max_aspect=1.0), side_multiple=64)
    assert squares == [(64, 64), (128, 128)]
    assert by_resolution(squares) == [range(1), range(1, 2)]


sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@given(sizes)
def test_a_picture_goes_to_a_bucket_of_each_resolution_that_it_is_large_enough_for(size: tuple[int, int]) -> None:
    for bucket, part in zip(fitting(size, SEVERAL, max_upscale=1.5), by_resolution(SEVERAL)):
        nearest = assign(size, SEVERAL[part.start : part.stop])
        assert bucket == (nearest if upscale(size, nearest) <= 1.5 else None)
    assert (size_problem(size, SEVERAL, max_upscale=1.5) is None) == any(fitting(size, SEVERAL, max_upscale=1.5))


def test_the_smallest_resolution_is_what_a_picture_is_too_small_for() -> None:
    assert fitting((400, 400), SEVERAL, max_upscale=1.5) == [(256, 256), (512, 512), None]
    said = size_problem((100, 110), SEVERAL, max_upscale=1.5)
    assert said is not None and said.startswith("it is too small, 100×110: 240×272 would enlarge it 2.5 times (data.")


# sizes that lie halfway between buckets, where the last bit decides
between = st.sampled_from([(int(math.sqrt(a.width * b.width)), int(math.sqrt(a.height * b.height)))
                           for a, b in itertools.pairwise(SEVERAL)])  # fmt: skip


@given(st.lists(sizes | between, min_size=1, max_size=50), st.sampled_from([1.0, 1.5, 3.0]))
def test_many_sizes_at_once_go_where_each_goes_by_itself(many: list[tuple[int, int]], max_upscale: float) -> None:
    ids = bucket_ids(np.array(many), SEVERAL, max_upscale=max_upscale)
    assert ids.shape == (len(many), 3)
    for size, row in zip(many, ids):
        assert [SEVERAL[i] if i >= 0 else None for i in row] == fitting(size, SEVERAL, max_upscale=max_upscale)


def test_a_million_sizes_take_seconds() -> None:
    many = np.random.default_rng(0).integers(200, 4000, (1_000_000, 2))
    began = time.process_time()
    ids = bucket_ids(many, SEVERAL, max_upscale=1.5)
    assert time.process_time() - began < 10
    assert ids.shape == (1_000_000, 3) and ids.min() == -1


def test_no_sizes_at_all() -> None:
    assert bucket_ids(np.empty((0, 2), int), SEVERAL, max_upscale=1.5).shape == (0, 3)


@pytest.mark.parametrize(
    ("resolution", "said"),
    [
        ([512, 512], "data.buckets.resolution: 512 is there twice: keep one"),
        ([], "data.buckets.resolution: write a whole number like 512, or a list of them like [512, 768]"),
        ("big", "data.buckets.resolution: write a whole number"),
        (512.0, "data.buckets.resolution: write a whole number"),
        (True, "data.buckets.resolution: write a whole number"),
        ([512, 4], "data.buckets.resolution: 4 is not within 8 … 16384 pixels"),
    ],
)
def test_resolutions_that_make_no_sense_are_named_once(resolution: object, said: str) -> None:
    with pytest.raises(InputError) as error:
        validate(BucketSettings, {"resolution": resolution}, where="data.buckets", name="data.buckets")
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(said)


def test_resolutions_that_share_a_bucket_or_do_not_fit_are_named_all() -> None:
    with pytest.raises(InputError, match=r"496 and 504 are too near each other, \d+×\d+ would be a bucket of both"):
        make_buckets(BucketSettings(resolution=[504, 496]), side_multiple=8)
    with pytest.raises(InputError) as error:
        make_buckets(BucketSettings(resolution=[510, 512, 700]), side_multiple=8)
    assert [problem[:29] for problem in error.value.problems] == [
        f"data.buckets.resolution = {side}" for side in (510, 700)
    ]


def test_pictures_halfway_between_two_buckets_go_to_the_first_to_the_last_bit() -> None:
    buckets = [Bucket(32, 128), Bucket(64, 64)]
    halfway = [(n, 2 * n) for n in range(1, 2000)]
    assert all(assign(size, buckets) == buckets[0] for size in halfway)
    assert (bucket_ids(np.array(halfway), buckets, max_upscale=1e9) == 0).all()
