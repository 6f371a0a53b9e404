"""Changes to many captions at once, seen before they are made and undone by `../undo.py`.

Every line of a text is a caption of its own, and its tags are the parts between commas.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lorakit.captioning import undo
from lorakit.captioning.folder import listed
from lorakit.captioning.protocol import one_line, pattern
from lorakit.core.errors import InputError
from lorakit.core.files import printable, write_text

Edit = Callable[[str], str]

_PARTS = re.compile(r"(,|\|\|\|)")  # what stands between tags: a comma, or the bars before those that stay in place


@dataclass(frozen=True)
class Change:
    """A text file by its path below the folder; its lines, as pairs of before and after; and its text for each."""

    file: str
    lines: tuple[tuple[str, str], ...]
    before: str
    after: str


def replaced(old: str, new: str, *, regex: bool) -> Edit:
    """Puts `new` in the place of every `old`. InputError where it is no regular expression."""
    if not old:
        raise InputError("--replace A B: A is empty: write what is to be found.")
    try:
        found, put = pattern(old, new, regex=regex)
    except ValueError as error:
        raise InputError(f"--replace: {error}.") from None
    return lambda line: found.sub(put, line)


def with_tag(text: str, *, first: bool) -> Edit:
    """Puts the tags of `text`, which commas part, behind or before all others of a caption that lacks them.

    InputError where one is empty or holds the bars that tags stand between.
    """
    wanted = list(dict.fromkeys(tag.strip() for tag in text.split(",")))
    if "" in wanted or "|||" in text:
        raise InputError(f"--add-tag {printable(text)!r}: write tags with commas between, none empty and without |||.")

    def edit(line: str) -> str:
        tags = [part.strip() for part in _PARTS.split(line)]
        lacking = ", ".join(tag for tag in wanted if tag not in tags)
        if not lacking:
            return line
        return f"{lacking}, {line}" if first else f"{line}, {lacking}"

    return edit


def without_tag(wanted: str) -> Edit:
    """Takes out the tags that match a pattern (*, ?), each with its comma; all else stays as it was written."""

    def edit(line: str) -> str:
        parts = _PARTS.split(line)
        unwanted = [fnmatchcase(tag.strip().lower(), wanted.strip().lower()) for tag in parts[::2]]
        if not any(unwanted):
            return line
        kept: list[str] = [""]  # separators and tags in turn, a separator before each tag
        for separator, tag, out in zip(["", *parts[1::2]], parts[::2], unwanted):
            if not out:
                kept += [separator, tag]
            elif separator == "|||":
                kept += [separator, ""]
        return "".join(kept).removeprefix(",").strip()

    return edit


def changes(folder: Path, edits: Sequence[Edit]) -> list[Change]:
    """What `edits`, one after the other, would change in the captions of `folder`.

    Raises InputError where captions would change that are not in text files, or none would be left.
    """
    items, problems = listed(folder)
    found: dict[str, Change] = {}
    for item in items:
        if item.problems:
            problems += item.problems
        elif not item.caption_file:
            if any(_edited(line, edits) != line for text in item.captions for line in text.splitlines()):
                problems.append(
                    f"{printable(folder / item.name)}: its captions stand in metadata or JSON, not changed here: "
                    "change them there, or put them into a text file."
                )
        elif item.caption_file not in found:
            text = (folder / item.caption_file).read_bytes().decode("utf-8")
            change = _change(item.caption_file, text, edits)
            if change is not None and not change.after.strip():
                problems.append(f"{printable(folder / item.caption_file)}: no caption would be left.")
            elif change is not None:
                found[change.file] = change
    if problems:
        raise InputError(problems)
    return list(found.values())


def apply(folder: Path, wanted: Sequence[Change]) -> undo.Kept:
    """Makes the changes, once the texts that they change are kept."""
    kept = undo.keep(folder, {change.file: change.before for change in wanted}, made_by="captions", finished=True)
    for change in wanted:
        write_text(folder / change.file, change.after)
    return kept


def _change(file: str, text: str, edits: Sequence[Edit]) -> Change | None:
    body = text.removeprefix("\ufeff")
    lines, after = [], []
    for whole in body.splitlines(keepends=True):
        line = whole.rstrip("\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029")
        new = _edited(line, edits)
        if new != line:
            lines.append((line, new))
        if new or not line.strip():
            after.append(new + whole[len(line) :])
    return Change(file, tuple(lines), text, "".join(after)) if lines else None


def _edited(line: str, edits: Sequence[Edit]) -> str:
    if not line.strip():  # no caption
        return line
    new = line
    for edit in edits:
        new = edit(new)
    return line if new == line else one_line(new)
