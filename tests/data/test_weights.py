import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.weights import parse_weights, split_tags, without_weights

# the examples in the docstring of AUTOMATIC1111's own parser
KNOWN = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)]
        + [("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
    ),
    ("[small] (red:0)", [("small", 1 / 1.1), (" ", 1.0), ("red", 0.0)]),
    ("a :) face", [("a :) face", 1.0)]),
    ("(ratio 3:x) 16:9", [("ratio 3:x", 1.1), (" 16:9", 1.0)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    (f"(a:{'9' * 400})", [(f"a:{'9' * 400}", 1.1)]),
    (r"C:\pictures", [(r"C:\pictures", 1.0)]),
    ("", [("", 1.0)]),
]


@pytest.mark.parametrize(("text", "expected"), KNOWN)
def test_what_is_known_of_the_syntax(text: str, expected: list[tuple[str, float]]) -> None:
    parts = parse_weights(text)
    assert [part for part, _ in parts] == [part for part, _ in expected]
    assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])
    assert without_weights(text) == "".join(part for part, _ in expected)


@given(st.text(alphabet="ab,()[]\\:1.5 "))
def test_any_text_has_parts_and_neighbours_differ_in_weight(text: str) -> None:
    parts = parse_weights(text)
    assert parts
    assert all(left[1] != right[1] for left, right in itertools.pairwise(parts))
    assert split_tags(text) == [tag.strip() for tag in text.split(",") if tag.strip()]
    cut = split_tags(text, weighted=True)
    assert all(tag == tag.strip() and tag for tag in cut)
    # only blanks and commas are lost
    assert re.sub("[ ,]", "", "".join(cut)) == re.sub("[ ,]", "", text)


def test_tags_are_not_cut_within_brackets() -> None:
    assert split_tags("(red, blue:1.2), tall,, [a, b]", weighted=True) == ["(red, blue:1.2)", "tall", "[a, b]"]
    assert split_tags("(red, blue:1.2), tall") == ["(red", "blue:1.2)", "tall"]
    assert split_tags("smile :(, tall, x)", weighted=True) == ["smile :(, tall, x)"]
    assert split_tags("smile :(, tall", weighted=True) == ["smile :(", "tall"]
    assert split_tags(r"name \(series, b\), tall", weighted=True) == [r"name \(series", r"b\)", "tall"]


@pytest.mark.parametrize("text", ["(" * 50_000, "(a" * 50_000, "(a" * 20_000 + ")" * 20_000, "[(a:2" * 20_000])
def test_many_brackets_takes_seconds(text: str) -> None:
    began = time.process_time()
    parse_weights(text)
    split_tags(text, weighted=True)
    assert time.process_time() - began < 5
