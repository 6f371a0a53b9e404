import collections
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import InputError
from lorakit.core.seeding import generator
from lorakit.core.settings import validate
from lorakit.data.captions import (
    CaptionSettings,
    class_caption,
    draw_caption,
    idle_class_words,
    is_random,
    plain,
    variants,
)

TAGS = st.lists(st.text("abcde", min_size=1, max_size=4), max_size=8)


def drawn(settings: CaptionSettings, *captions: str, n: int = 200, weighted: bool = False) -> list[str]:
    """Fresh texts of many samples."""
    return [draw_caption(settings, captions, draw=generator("sample", i), weighted=weighted) for i in range(n)]


def tags_of(text: str) -> list[str]:
    return [tag for tag in text.split(", ") if tag]


def test_what_is_written_stays_to_the_letter_without_settings() -> None:
    text = "a  photo,of {a} dog ,  with |commas (and: such)"
    assert drawn(CaptionSettings(), f" {text}\n", n=3) == [text] * 3
    assert variants(CaptionSettings(), (text,), count=5) == (text,)
    assert not is_random(CaptionSettings(), (text,))
    assert plain(CaptionSettings(), (text,)) == text


def test_prefix_trigger_caption_suffix_in_this_order() -> None:
    settings = CaptionSettings(prefix=" a photo of ", trigger="sks", suffix="in the snow ")
    assert drawn(settings, "a dog", n=1) == ["a photo of sks a dog in the snow"]
    assert drawn(settings, "", n=1) == drawn(settings, n=1) == ["a photo of sks in the snow"]
    assert drawn(CaptionSettings(), "", n=1) == [""]
    assert drawn(CaptionSettings(trigger="sks", shuffle_tags=True), "a", n=1) == ["sks a"]


@given(TAGS, st.integers(0, 9), st.integers(0, 3))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(tags: list[str], keep: int, seed: int) -> None:
    settings = CaptionSettings(shuffle_tags=True, keep_tags=keep)
    text = draw_caption(settings, (",".join(tags),), draw=generator(seed))
    assert collections.Counter(tags_of(text)) == collections.Counter(tags)
    assert tags_of(text)[:keep] == tags[:keep]


def test_every_order_of_the_others_comes_equally_often() -> None:
    counts = collections.Counter(drawn(CaptionSettings(shuffle_tags=True, keep_tags=1), "k, a, b, c", n=3000))
    assert len(counts) == 6
    assert all(400 < count < 600 for count in counts.values())


@given(TAGS, TAGS, TAGS, st.booleans(), st.integers(0, 2))
def test_head_and_tail_stay_whatever_happens_between(
    head: list[str], middle: list[str], tail: list[str], shuffle: bool, seed: int
) -> None:
    settings = CaptionSettings(shuffle_tags=shuffle, tag_dropout=0.5)
    three = " ||| ".join(", ".join(part) for part in (head, middle, tail))
    text = tags_of(draw_caption(settings, (three,), draw=generator(seed)))
    assert text[: len(head)] == head
    assert text[len(text) - len(tail) :] == tail
    assert not collections.Counter(text[len(head) : len(text) - len(tail)]) - collections.Counter(middle)
    two = " ||| ".join(", ".join(part) for part in (middle, tail))
    text = tags_of(draw_caption(settings, (two,), draw=generator(seed)))
    assert text[len(text) - len(tail) :] == tail
    assert not collections.Counter(text[: len(text) - len(tail)]) - collections.Counter(middle)


@given(st.text("a,| {}", max_size=20), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_the_separator_never_reaches_the_model(text: str, shuffle: bool, dropout: float) -> None:
    settings = CaptionSettings(shuffle_tags=shuffle, tag_dropout=dropout)
    separators = text.count("|||")
    for result in (*drawn(settings, text, n=2), *variants(settings, (text,), count=2), plain(settings, (text,))):
        assert "|||" not in result or separators == 0


def test_more_separators_than_two_only_part_the_middle() -> None:
    assert drawn(CaptionSettings(), "a ||| b, ||| c ||| d", n=1) == ["a, b, c, d"]


def test_tags_are_dropped_as_often_as_said_each_by_itself() -> None:
    texts = [tags_of(text) for text in drawn(CaptionSettings(tag_dropout=0.3), "a, b, c", n=4000)]
    there = np.array([[tag in text for tag in "abc"] for text in texts])
    assert there.mean(0) == pytest.approx([0.7] * 3, abs=0.03)
    assert np.corrcoef(there.T)[np.triu_indices(3, 1)] == pytest.approx([0] * 3, abs=0.06)
    assert all(text == sorted(text) for text in texts), "what is left keeps its order"


def test_all_dropped_leaves_what_is_kept() -> None:
    settings = CaptionSettings(tag_dropout=1.0, keep_tags=1, trigger="sks")
    assert drawn(settings, "a, b, c", n=1) == ["sks a"]
    assert drawn(CaptionSettings(tag_dropout=1.0), "a, b", n=1) == [""]


def test_patterns_say_what_may_be_dropped_and_what_never() -> None:
    caption = "Red hair, blue eyes, solo, red dress"
    assert drawn(CaptionSettings(tag_dropout=1.0, never_drop=["RED *"]), caption, n=1) == ["Red hair, red dress"]
    assert drawn(CaptionSettings(tag_dropout=1.0, drop_tags=["*eyes", "s?lo"]), caption, n=1) == ["Red hair, red dress"]
    both = CaptionSettings(tag_dropout=1.0, drop_tags=["red*"], never_drop=["*dress"])
    assert drawn(both, caption, n=1) == ["blue eyes, solo, red dress"]
    weighted = CaptionSettings(tag_dropout=1.0, never_drop=["red hair"])
    assert drawn(weighted, "(red hair:1.2), solo", n=1, weighted=True) == ["(red hair:1.2)"]


@given(TAGS, st.lists(st.sampled_from(["a*", "*b", "c", "?d*"]), max_size=2), st.integers(0, 3))
def test_what_is_never_dropped_is_always_there(tags: list[str], never: list[str], seed: int) -> None:
    settings = CaptionSettings(tag_dropout=0.9, shuffle_tags=True, never_drop=never)
    always = drawn(CaptionSettings(tag_dropout=1.0, never_drop=never), ", ".join(tags), n=1)[0]
    text = draw_caption(settings, (", ".join(tags),), draw=generator(seed))
    assert not collections.Counter(tags_of(always)) - collections.Counter(tags_of(text))


def test_commas_within_emphasis_part_no_tags() -> None:
    settings = CaptionSettings(shuffle_tags=True)
    texts = set(drawn(settings, "(a, b:1.2), c", weighted=True))
    assert texts == {"(a, b:1.2), c", "c, (a, b:1.2)"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} car", {"a red car", "a blue car"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c} d|}", {"a", "b d", "c d", ""}),
        ("{a} {b", {"{a} {b"}),
        ("a} | {b|c}", {"a} | b", "a} | c"}),
        ("{a {b|c}", {"{a b", "{a c"}),
        ("{x|y", {"{x|y"}),
        ("{{a}|b}", {"{a}", "b"}),
        ("{a, b|c}, d", {"a, b, d", "c, d"}),
    ],
)
def test_wildcards(text: str, expected: set[str]) -> None:
    assert set(drawn(CaptionSettings(), text, n=100)) == expected
    assert is_random(CaptionSettings(), (text,)) == (len(expected) > 1)
    assert drawn(CaptionSettings(wildcards=False), text, n=1) == [text]


def test_wildcards_are_chosen_before_tags_are_cut() -> None:
    settings = CaptionSettings(shuffle_tags=True)
    assert set(drawn(settings, "{a, b|c}, d", n=300)) == {
        *("a, b, d", "a, d, b", "b, a, d", "b, d, a", "d, a, b", "d, b, a"),
        *("c, d", "d, c"),
    }


def test_many_braces_takes_seconds() -> None:
    began = time.process_time()
    for text in ("{" * 200_000, "{a|" * 90_000, "{a|" * 50_000 + "}" * 50_000, "{a" * 90_000 + "}" * 90_000):
        drawn(CaptionSettings(), text, n=1)
    assert time.process_time() - began < 5


def test_lines_are_captions_or_one_text() -> None:
    text = "one\r\n\n  two \nthree"
    counts = collections.Counter(drawn(CaptionSettings(), text, "four", n=4000))
    assert set(counts) == {"one", "two", "three", "four"}
    assert all(900 < count < 1100 for count in counts.values())
    assert drawn(CaptionSettings(lines="text"), text, n=1) == [text]
    assert plain(CaptionSettings(), (text,)) == "one"


def test_a_dropped_caption_is_empty_trigger_and_all() -> None:
    settings = CaptionSettings(caption_dropout=0.25, trigger="sks", class_prompt="a dog")
    texts = drawn(settings, "a", n=4000)
    assert set(texts) == {"", "sks a"}
    assert texts.count("") == pytest.approx(1000, abs=110)
    assert not is_random(settings, ("a",)), "the dropped caption is shared, not a variant"
    assert variants(settings, ("a",), count=4) == ("sks a",)


def test_variants_are_what_samples_may_come_with() -> None:
    settings = CaptionSettings(shuffle_tags=True, tag_dropout=0.5, trigger="sks")
    some = variants(settings, ("a, b, c, {d|e}",), count=6)
    assert len(some) == 6 and len(set(some)) > 2
    assert set(some) <= set(drawn(settings, "a, b, c, {d|e}", n=2000))
    assert some == variants(settings, ("a, b, c, {d|e}",), count=6)
    assert variants(settings, ("a, b, c, {d|e}",), count=9)[:6] == some
    picked = [draw_caption(settings, ("x",), draw=generator(i), variants=some) for i in range(6000)]
    counts = collections.Counter(picked)
    assert all(counts[text] == pytest.approx(1000 * some.count(text), rel=0.15) for text in some)


@given(st.lists(st.sampled_from(["a", "b", "c, d", "{e|f}"]), min_size=1, max_size=5), st.integers(1, 7))
def test_every_line_is_among_the_variants_equally_often(lines: list[str], count: int) -> None:
    settings = CaptionSettings(shuffle_tags=True)
    caption = "\n".join(f"{line}, {number}" for number, line in enumerate(lines))
    by_line = collections.Counter(
        next(tag for tag in tags_of(text) if tag.isdigit()) for text in variants(settings, (caption,), count=count)
    )
    assert len(by_line) == len(lines) and len(set(by_line.values())) == 1
    assert sum(by_line.values()) < count + len(lines)
    plainly = variants(CaptionSettings(), ("x\ny\nz",), count=count)
    assert sorted(plainly) == ["x", "y", "z"]


@given(st.text("ab,{|} \n", max_size=12), st.booleans(), st.sampled_from([0.0, 0.4]))
def test_only_what_is_random_varies(text: str, shuffle: bool, dropout: float) -> None:
    settings = CaptionSettings(shuffle_tags=shuffle, tag_dropout=dropout)
    if not is_random(settings, (text,)):
        assert len({*drawn(settings, text, n=8), *variants(settings, (text,), count=8)}) == 1
        assert len(variants(settings, (text,), count=8)) == 1


def test_what_one_setting_draws_does_not_depend_on_the_others() -> None:
    caption = "{x|y}, a, b, c, d"
    plainly = drawn(CaptionSettings(), caption)
    dropped = drawn(CaptionSettings(tag_dropout=0.4), caption)
    shuffled = drawn(CaptionSettings(tag_dropout=0.4, shuffle_tags=True), caption)
    empty = drawn(CaptionSettings(tag_dropout=0.4, shuffle_tags=True, caption_dropout=0.3), caption)
    for one, two, three, four in zip(plainly, dropped, shuffled, empty, strict=True):
        assert set(tags_of(two)) <= set(tags_of(one))
        assert sorted(tags_of(two)) == sorted(tags_of(three))
        assert four in ("", three)


def test_the_number_of_draws_is_always_the_same() -> None:
    settings = CaptionSettings(tag_dropout=0.4, shuffle_tags=True, caption_dropout=0.5)
    for one, caption, some in ((settings, "{a|b}, c\nd", None), (CaptionSettings(), "a", None), (settings, "a", ["b"])):
        draw = generator(7)
        draw_caption(one, (caption,), draw=draw, variants=some)
        rest = torch.rand((), generator=draw)
        fresh = generator(7)
        torch.rand(3, generator=fresh, dtype=torch.float64)
        assert rest == torch.rand((), generator=fresh)


def test_global_generators_have_no_part_in_it() -> None:
    settings = CaptionSettings(tag_dropout=0.4, shuffle_tags=True, caption_dropout=0.3)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = drawn(settings, "{a|b}, c, d"), variants(settings, ("{a|b}, c, d",), count=5)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    torch.manual_seed(1)
    assert first == (drawn(settings, "{a|b}, c, d"), variants(settings, ("{a|b}, c, d",), count=5))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError) as error:
        validate(
            CaptionSettings,
            {"tag_dropout": 1.5, "keep_tags": -1, "lines": "caption", "drop_tags": "red"},
            where="data.sources.0",
            name="a source",
        )
    said = "\n".join(error.value.problems)
    assert all(f"data.sources.0.{key}" in said for key in ("tag_dropout", "keep_tags", "lines", "drop_tags"))
    assert len(error.value.problems) == 4


# -- the class in the place of what is learnt --------------------------------------------------------------------------


def test_class_words_stand_in_the_place_of_whole_words() -> None:
    settings = CaptionSettings(trigger="sks", class_words={"sks": "dog", "sks dog": "hound", "a (b)": "c"})
    for caption, expected in {
        "sks on a beach": "dog on a beach",
        "a sks dog, sks": "a hound, dog",  # the longest first
        "(sks:1.2), a (b) d": "(dog:1.2), c d",
        "asks, sksy, SKS": None,
        "": None,
    }.items():
        assert class_caption(settings, caption) == expected
    assert class_caption(CaptionSettings(), "sks") is None
    prompt = CaptionSettings(class_prompt="a dog")
    assert [class_caption(prompt, caption) for caption in ("sks", "")] == ["a dog"] * 2


def test_a_class_word_that_stands_nowhere_is_named() -> None:
    settings = CaptionSettings(trigger="sks", class_words={"sks": "dog", "hat": "cap", "shoe": "boot"})
    assert idle_class_words(settings, [("a",), ("b", "a hat")]) == ["shoe"]
    assert idle_class_words(CaptionSettings(), [("a",)]) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [({"class_words": {" ": "dog"}}, "empty word"), ({"class_words": {"a": "b"}, "class_prompt": "c"}, "keep one")],
)
def test_class_words_that_say_nothing_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CaptionSettings(**values)
