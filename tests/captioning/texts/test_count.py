"""Frequencies, and their bars."""

import numpy as np

from lorakit.captioning.texts import count


def test_tags_and_words_are_counted_once_a_caption() -> None:
    captions = ["dog, dog, Red Dog ||| sky", "dog,sky", "the dog's sky"]
    assert count.tags(captions) == {"dog": 2, "Red Dog": 1, "sky": 2, "the dog's sky": 1}
    assert count.words(captions) == {"dog": 2, "red": 1, "sky": 3, "the": 1, "dog's": 1}


def test_bars_are_as_long_as_their_counts() -> None:
    counts = [("a" * 300, 10), ("b", 5)] + [(f"{i}", 1) for i in range(60)]
    image = count.bars(counts, title="Tags", total=20)
    yellow = (np.asarray(image) == count._BAR).all(axis=2).sum(axis=1)
    lengths = yellow[count._MARGIN + 48 + count._ROW // 2 :: count._ROW]
    assert list(np.flatnonzero(lengths)) == list(range(count.SHOWN)), "one bar a row, and no more than are shown"
    assert abs(lengths[0] - 2 * lengths[1]) <= 2 and abs(lengths[0] - 10 * lengths[2]) <= 20
