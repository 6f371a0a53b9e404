import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import example as hypothesis_example
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.types import Example, Place
from lorakit.data.examples import ROLES, ExamplesBuilder
from lorakit.data.sources import escape, make_key, unescape

SHA = st.binary(min_size=32, max_size=32).map(bytes.hex)
NAME = st.text(min_size=1, max_size=12)
PLACE = st.builds(Place, NAME, st.integers(-1, 2**40), st.integers(-1, 2**40))
CAPTION = st.text(st.characters(exclude_characters="\x1e", exclude_categories=["Cs"]), max_size=12)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    source, name = draw(st.integers(0, 99)), draw(NAME)
    mask = draw(st.none() | PLACE)
    return Example(
        make_key(source, name),
        source,
        draw(st.one_of(st.just(Place(name)), st.just(Place("", 7)), PLACE)),
        tuple(draw(st.lists(CAPTION, min_size=1, max_size=3))),
        draw(st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))),
        draw(SHA),
        role=draw(st.sampled_from(ROLES)),
        mask=mask,
        mask_digest=draw(SHA) if mask else "",
        focus=draw(st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1))),
        look=draw(st.integers(0, 2**128 - 1)),
    )


@given(st.lists(examples(), max_size=6))
def test_what_goes_in_comes_out(given_examples: list[Example]) -> None:
    builder = ExamplesBuilder()
    for example in given_examples:
        builder.add(example)
    built = builder.build()
    for packed in (built, pickle.loads(pickle.dumps(built))):
        assert list(packed) == given_examples
        assert list(packed.keys) == [e.key for e in given_examples]
        assert [ROLES[r] for r in packed.roles] == [e.role for e in given_examples]
        assert packed.sizes.tolist() == [list(e.size) for e in given_examples]
        assert packed.sources.tolist() == [e.source for e in given_examples]
        assert packed.has_mask().tolist() == [e.mask is not None for e in given_examples]
        assert [packed.captions(i) for i in range(len(packed))] == [e.captions for e in given_examples]


@given(st.text(max_size=20))
@hypothesis_example("a\\nb")
@hypothesis_example("\\x41\n\x1b\udcff\u2028\U000e0001é\\\\")
def test_escaped_names_are_one_line_and_come_back(name: str) -> None:
    assert escape(name).isprintable()
    assert unescape(escape(name)) == name


def example(number: int, key_length: int = 80, caption_length: int = 100) -> Example:
    name = f"folder/{number:08d}".ljust(key_length - 2, "k")
    caption = f"{number} ".ljust(caption_length, "c")
    return Example(f"0/{name}", 0, Place(name), (caption,), (640, 480), f"{number:064x}", look=number)


def test_slices_ends_and_roles() -> None:
    builder = ExamplesBuilder()
    for i in range(5):
        builder.add(example(i))
    built = builder.build()
    assert built[-1] == example(4) and built[1:3] == [example(1), example(2)]
    assert built.keys[-1] == example(4).key and built.keys[3:] == [example(3).key, example(4).key]
    with pytest.raises(IndexError):
        built[5]
    other = built.with_roles(np.array([0, 2, 0, 1, 0]))
    assert [e.role for e in other] == ["train", "validation", "train", "regularization", "train"]
    assert {e.role for e in built} == {"train"}
    for wrong in ([0, 0], [0, 0, 0, 0, 3]):
        with pytest.raises(ValueError, match="roles must be 5 numbers below 3"):
            built.with_roles(np.array(wrong))


def test_memory_and_pickles_are_small() -> None:
    count = 60_000
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        builder = ExamplesBuilder()
        for i in range(count):
            builder.add(example(i))
        built = builder.build()
        del builder
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (held - before) / count <= 400
    assert (peak - before) / count <= 500
    assert len(pickle.dumps(built)) / count <= 400
    assert built[count - 1] == example(count - 1)
    assert built.with_roles(built.roles).keys is built.keys
    assert copy.copy(built).sizes is built.sizes
