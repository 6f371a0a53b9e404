"""The page needs nothing else, lets nothing in a file's name become markup, and stays readable without its script."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data import page as module
from lorakit.data.buckets import Bucket
from lorakit.data.page import page, write_page
from lorakit.data.report import DataReport, make_report, rows
from tests.data.pictures import noise
from tests.data.standin import Held

VOID = {"meta", "img", "br", "input", "hr", "link"}


class Reader(HTMLParser):
    """What a browser makes of a page: tags with their attributes, text by its tag; wrongly nested ones fail."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("style", "script"))


def page_of(data: Held, **changes: Any) -> str:
    report = make_report(
        data.examples, settings=data.settings, buckets_of=data.buckets_of, captions_of=data.captions_of, **changes
    )
    return "".join(page(report, data=data, rows=rows(data, report=report), title="corgi.toml"))


@pytest.fixture
def few() -> Held:
    return Held(
        [noise(*size, seed=i) for i, size in enumerate([(64, 64), (160, 104), (64, 64)])],
        roles=["train", "validation", "regularization"],
    )


EVIL = "<img src=x onerror=alert(1)>.png"


def test_nothing_from_a_file_becomes_markup() -> None:
    evil = f"\"'>{EVIL}</td></table></script><script>alert(2)</script>"
    data = Held([noise(64, 64)], keys=[f"0/{EVIL}"], captions=[evil])
    changes = {kind: [f"{kind} {evil}"] for kind in ("errors", "warnings", "skipped")}
    report = make_report(data.examples, settings=data.settings, buckets_of=data.buckets_of, **changes)
    text = "".join(page(report, data=data, rows=rows(data, report=report), title=evil))
    read = Reader(text)
    assert len(read.of("script")) == 1
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in read.of("img"))
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert read.said().count(evil) >= 5 and read.said().count(f"0/{EVIL}") == 2  # shown, as what they are


@settings(max_examples=25)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_name_and_caption_leaves_the_page_whole(name: str, caption: str) -> None:
    data = Held([noise(8, 8)], keys=["0/" + name], captions=[caption], resolution=8)
    report = make_report(data.examples, settings=data.settings, errors=[name], warnings=[caption])
    text = "".join(page(report, data=data, rows=rows(data, report=report)))
    read = Reader(text)
    plain = {tag for tag, _ in Reader("".join(page(report))).tags}
    assert {tag for tag, _ in read.tags} <= plain | {
        "figure",
        "figcaption",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    } | {
        *(
            "button",
            "input",
            "output",
            "img",
            "small",
            "br",
            "i",
            "svg",
            "g",
            "rect",
            "text",
            "title",
            "p",
            "div",
            "ul",
            "li",
        )
    }
    assert all(c.isprintable() or c == "\n" for c in text)


def test_nothing_is_loaded_and_nothing_may_be(few: Held) -> None:
    text = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", page_of(few))
    read = Reader(text)
    policy = [meta["content"] for meta in read.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert not re.search(r"https?:|//\w|url\(|@import|fetch|XMLHttp", text)
    assert not read.of("link") and not any("src" in script for script in read.of("script"))


def test_all_of_the_report_is_on_it(few: Held) -> None:
    text = page_of(
        few, warnings=["0/a.txt: a caption of no picture"], skipped=["0/bad.png: it is damaged"], errors=["bad"]
    )
    said = Reader(text).said()
    for wanted in ("corgi.toml", "80 × 56", "64 × 64", "picture number 1", "0/002.png", "a caption of no picture"):
        assert wanted in said
    assert "validation" in said and "regularization" in said and "1 error" in said and "it is damaged" in said


def test_the_table_holds_each_picture_once_in_order_with_what_is_sorted_by(few: Held) -> None:
    text = page_of(few)
    body = text[text.index('<table id="pictures"') :]
    assert re.findall(r"<td class=key>(.*?)</td>", body) == ["0/000.png", "0/001.png", "0/002.png"]
    assert re.findall(r'data-v="(\d+)">\d+&nbsp;×', body) == [str(64 * 64), str(160 * 104), str(64 * 64)]
    heads = re.findall(r"<th scope=col aria-sort", body)
    row = body[body.index("<tbody>") :]
    assert len(heads) + 1 == row[: row.index("</tr>")].count("<td")
    assert body.count("<img") == 3
    assert '<p id="tools" hidden>' in text  # a filter that would do nothing is not shown without the script


def test_what_is_cut_off_is_said_of_the_whole_picture() -> None:
    data = Held([noise(200, 100)], anchor=(0.0, 0.5))  # at 64 × 64, so that half of its width goes
    data.buckets_of = lambda index: (Bucket(64, 64),)  # type: ignore[method-assign]
    text = page_of(data)
    assert '<td class=n data-v="0.500000">50.0%</td>' in text
    assert "<strong>50.0%</strong><small>of width or height on average, 50.0% at most</small>" in text
    assert 'title="of its width or height, both sides together">cut off<' in text


def test_of_very_many_pictures_only_a_sample_is_shown(few: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THUMBNAILS", 2)
    text = page_of(few)
    body = text[text.index('<table id="pictures"') :]
    assert body.count("<td class=key>") == 3 and "<img" not in body
    assert text.count("<figure>") == 3


def test_long_lists_are_folded_not_cut() -> None:
    report = DataReport(warnings=tuple(f"warning {i}" for i in range(50)))
    text = "".join(page(report))
    assert text.count("<li>") == 50 and "and 30 more" in text
    assert text.index("warning 19") < text.index("<details>") < text.index("warning 20")


def test_a_report_without_data_is_a_page_too() -> None:
    read = Reader("".join(page(DataReport(errors=("all is lost",)))))
    assert "all is lost" in read.said() and not read.of("table") and not read.of("img")


def test_it_is_written_whole_or_not_at_all(few: Held, tmp_path: Path) -> None:
    report = make_report(few.examples, settings=few.settings)
    write_page(tmp_path / "check.html", report, data=few, rows=rows(few))
    before = (tmp_path / "check.html").read_bytes()
    assert before.decode().endswith("</html>\n")

    def failing() -> Any:
        yield next(rows(few))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_page(tmp_path / "check.html", report, data=few, rows=failing())
    assert [path.name for path in tmp_path.iterdir()] == ["check.html"]
    assert (tmp_path / "check.html").read_bytes() == before
