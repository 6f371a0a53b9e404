"""Looks at the captions of a folder, and changes many at once.

  lorakit captions photos                                 a table of all
  lorakit captions photos --count --out tags.png          how often each tag comes, with bars; --count words
  lorakit captions photos --similar                       captions that say the same of several pictures, or nearly
  lorakit captions photos --base BASE --trigger qzx       too long captions, and what the model makes of a trigger word
  lorakit captions photos --replace "a dog" "qzx dog" --remove-tag "*background" --add-tag photo

Changes are shown and not made, unless --apply is there. What they change is kept in a hidden file of the folder;
--undo puts it back (--undo FILE: that of another change than the last). What cannot be read is named after what can
be, with exit code 2; nothing is changed then.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import InputError
from lorakit.core.files import printable, written_aside

if TYPE_CHECKING:
    from lorakit.captioning.texts.edit import Change
    from lorakit.verbs.captions import Looked

HELP = "look at a folder's captions, and change many at once"

_LINES = 20  # of a list; more would push what is said of it off the screen
_BAR = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of pictures with captions")
    parser.add_argument("--table", action="store_true", help="every caption (what is done if nothing else is asked)")
    parser.add_argument("--count", nargs="?", const="tags", choices=("tags", "words"), help="how often each comes")
    parser.add_argument("--out", metavar="FILE", type=Path, help="with --count: a picture of bars (PNG)")
    parser.add_argument("--similar", action="store_true", help="captions that are the same, or nearly")
    parser.add_argument("--base", metavar="BASE", help="count tokens as this model does")
    parser.add_argument("--family", help="the base's model family (default: as its folder says)")
    parser.add_argument("--trigger", metavar="WORD", help="with --base: the tokens of a word for what is learnt")
    parser.add_argument(
        "--replace", metavar=("A", "B"), nargs=2, action="append", default=[], help="B in the place of A"
    )
    parser.add_argument("--regex", action="store_true", help="A is a regular expression")
    parser.add_argument("--remove-tag", metavar="TAG", action="append", default=[], help="a pattern (*, ?)")
    parser.add_argument("--add-tag", metavar="TAG", action="append", default=[], help="behind the others")
    parser.add_argument("--first", action="store_true", help="with --add-tag: before the others")
    parser.add_argument("--apply", action="store_true", help="make the changes that are shown")
    parser.add_argument(
        "--undo", metavar="FILE", nargs="?", const="", help="put back what the last change, or this, kept"
    )


def run(args: argparse.Namespace) -> None:
    edits = bool(args.replace or args.remove_tag or args.add_tag)
    looks = bool(args.table or args.count or args.similar or args.base)
    problems = [
        f"{name} belongs to {to}: add it, or leave {name} out."
        for name, there, to, given in (
            ("--out", args.out is not None, "--count", args.count),
            ("--trigger", args.trigger is not None, "--base", args.base),
            ("--family", args.family is not None, "--base", args.base),
            ("--regex", args.regex, "--replace", args.replace),
            ("--first", args.first, "--add-tag", args.add_tag),
            ("--apply", args.apply, "a change", edits),
        )
        if there and not given
    ]
    if edits + looks + (args.undo is not None) > 1:
        problems.append("looking, changing and --undo are three commands: give one.")
    if problems:
        raise InputError(problems)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a caption's letters shows the others
    if args.undo is not None:
        _undo(args)
    elif edits:
        _edit(args)
    else:
        _look(args)


def _undo(args: argparse.Namespace) -> None:
    from lorakit.captioning.folder import storage
    from lorakit.captioning.undo import newest, read, restore

    storage(args.folder)
    kept = read(Path(args.undo)) if args.undo else newest(args.folder)
    if kept is None:
        raise InputError(f"{printable(args.folder)}: nothing was kept there that could be put back.")
    now = restore(args.folder, kept)
    print(f"{len(kept.before):,} files are as they were before {printable(kept.file.name)} was written.")
    print(f"What was there until now: {printable(now.file)}")


def _edit(args: argparse.Namespace) -> None:
    from lorakit.captioning.texts.edit import apply, changes, replaced, with_tag, without_tag

    edits = [replaced(old, new, regex=args.regex) for old, new in args.replace]
    edits += [without_tag(tag) for tag in args.remove_tag]
    edits += [with_tag(tag, first=args.first) for tag in args.add_tag]
    wanted = changes(args.folder, edits)
    _show(wanted)
    lines = sum(len(change.lines) for change in wanted)
    if not wanted:
        print("No caption would change.")
    elif args.apply:
        kept = apply(args.folder, wanted)
        print(f"{lines:,} captions in {len(wanted):,} files changed. What was there: {printable(kept.file)}")
    else:
        print(f"{lines:,} captions in {len(wanted):,} files would change: add --apply to change them.")


def _show(wanted: "Sequence[Change]") -> None:
    for change in wanted[:_LINES]:
        print(printable(change.file))
        for before, after in change.lines:
            print(f"  - {printable(before)}\n  + {printable(after) or '(the line is left out)'}")
    if len(wanted) > _LINES:
        print(f"and {len(wanted) - _LINES:,} more files")


def _look(args: argparse.Namespace) -> None:
    from lorakit.verbs.captions import look

    looked = look(args.folder, base=args.base, family=args.family, word=args.trigger)
    if args.table or not (args.count or args.similar or args.base):
        _table(looked)
    if args.count:
        _count(looked, args)
    if args.similar:
        _similar(looked)
    if args.base:
        _tokens(looked)
    if looked.problems:
        sys.stdout.flush()  # before the message that comes on stderr
        raise InputError(looked.problems)


def _table(looked: "Looked") -> None:
    width = min(40, max(len(line.picture) for line in looked.lines))
    for line in looked.lines:
        tokens = "" if line.tokens is None else f"{line.tokens:>5}"
        print(f"{line.picture:<{width}}{tokens}  {printable(line.text) or '(no caption)'}")
    with_text = len({line.picture for line in looked.lines if line.text})
    print(f"\n{len({line.picture for line in looked.lines}):,} pictures, {with_text:,} with captions")


def _count(looked: "Looked", args: argparse.Namespace) -> None:
    from lorakit.captioning.texts import count

    captions = [line.text for line in looked.lines if line.text]
    counts = sorted(getattr(count, args.count)(captions).items(), key=lambda pair: (-pair[1], pair[0]))
    if not counts:
        raise InputError([f"{printable(args.folder)}: its pictures have no captions to count in.", *looked.problems])
    shown = counts[: 2 * _LINES]
    width = min(40, max(len(printable(name)) for name, _ in shown))
    solid = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    for name, number in shown:
        print(f"{number:>7,}  {printable(name)[:40]:<{width}}  {solid * max(1, round(_BAR * number / counts[0][1]))}")
    more = f", {len(counts) - len(shown):,} more are not shown" if len(counts) > len(shown) else ""
    print(f"\n{len(counts):,} {args.count} in {len(captions):,} captions{more}")
    if args.out is not None:
        title = f"{args.count.capitalize()} of {args.folder.resolve().name}"
        picture = count.bars(counts, title=title, total=len(captions))
        with written_aside(args.out) as aside:
            picture.save(aside, format="PNG")
        print(f"Written: {printable(args.out)}")


def _similar(looked: "Looked") -> None:
    from lorakit.captioning.texts.near import alike

    lines = [line for line in looked.lines if line.text]
    found = alike([line.text for line in lines])
    for group in found:
        names = list(dict.fromkeys(lines[number].picture for number in group.same))
        if len(group.same) > 1:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            print(f"{len(group.same):,} times: {printable(lines[group.same[0]].text)}\n  {', '.join(names[:5])}{more}")
        if group.near is not None:
            other = lines[group.near]
            print(f"{names[0]}: {printable(lines[group.same[0]].text)}")
            print(f"  nearly as {other.picture}: {printable(other.text)}")
    if not found:
        print("No two captions are alike.")


def _tokens(looked: "Looked") -> None:
    for text in _about_trigger(looked):
        print(text)
    for line in looked.too_long[:_LINES]:
        print(f"{line.picture}: {line.tokens:,} tokens, {looked.token_limit:,} are read: {printable(line.text)}")
    if len(looked.too_long) > _LINES:
        print(f"and {len(looked.too_long) - _LINES:,} more")
    longest = max((line.tokens or 0 for line in looked.lines), default=0)
    print(
        f"{len(looked.too_long):,} of {len(looked.lines):,} captions are longer than the {looked.token_limit:,} tokens "
        f"that are read; the longest has {longest:,}."
    )


def _about_trigger(looked: "Looked") -> Iterator[str]:
    if (word := looked.trigger) is None:
        return
    for name, pieces in word.pieces.items():
        yield f"{printable(word.word)} in {name}: {' · '.join(map(printable, pieces))} ({len(pieces)} tokens)"
    if word.known:
        yield (
            f"Warning: {printable(word.word)} is a word that the model knows ({', '.join(word.known)}), and what it "
            "means mixes with what is taught: choose one that is cut into two or more tokens."
        )
    uses = sum(word.word.lower() in line.text.lower() for line in looked.lines)
    yield f"{printable(word.word)} is in {uses:,} of {len(looked.lines):,} captions."
