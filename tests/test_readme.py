"""What the README and its neighbours promise is held against the disk and the command line."""

import re
import shlex
from pathlib import Path

import pytest

from lorakit.cli.main import VERBS, parser

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/design/decisions.md", "docs/design/log.md")
# made by tools or by running lorakit; not part of the project
PASSING = {"__pycache__", "_data", "runs", "demo", "build", "dist"}


def tree() -> dict[str, str]:
    """Path -> comment of each entry in the README's file tree; folders end in a slash."""
    block = re.search(r"## What lies where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    entries: dict[str, str] = {}
    above: list[str] = []
    for line in block[1].splitlines():
        indent, name, comment = re.fullmatch(r"((?:  )*)(\S+) +(\S.*)", line).groups()
        above = [*above[: len(indent) // 2], name]
        entries["".join(above)] = comment
    return entries


def listed(folder: str) -> set[str]:
    """The entries of the tree right in `folder` ("" is the repository)."""
    inside = (entry.removeprefix(folder) for entry in tree() if entry.startswith(folder) and entry != folder)
    return {entry for entry in inside if "/" not in entry.rstrip("/")}


def present(folder: str) -> set[str]:
    kept = {".ci"}
    names = (p for p in (ROOT / folder).iterdir() if p.name in kept or not p.name.startswith("."))
    names = (p for p in names if p.name not in PASSING and not p.name.endswith(".egg-info"))
    return {f"{p.name}/" if p.is_dir() else p.name for p in names}


@pytest.mark.parametrize("entry", tree())
def test_what_the_tree_names_is_there(entry):
    path = ROOT / entry
    assert path.is_dir() if entry.endswith("/") else path.is_file()


@pytest.mark.parametrize("folder", ["", "lorakit/", "data/"])
def test_what_is_there_is_named(folder):
    assert present(folder) - listed(folder) == set(), "add it to the README's tree, or to PASSING in this test"


def test_the_tree_names_the_right_floors():
    from tests.test_architecture import FLOORS

    for entry, comment in tree().items():
        floor = re.match(r"floor (\d)", comment)
        name = entry.removeprefix("lorakit/").rstrip("/").removesuffix(".py")
        if floor:
            assert FLOORS[name] == int(floor[1]), entry


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    files = re.findall(r"`((?:lorakit|tests|scripts|recipes|docs)/[\w./-]+)`", text)
    missing = [name for name in links if not ((ROOT / page).parent / name).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text() + "".join(p.read_text() for p in (ROOT / "recipes").glob("*.toml"))
    found = re.findall(r"(?:-m |\.venv/bin/|^# +)lorakit ([a-z]+ [^\n`]*)", text, re.MULTILINE)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_parses(command):
    arguments = parser().parse_args(shlex.split(command))
    assert arguments.verb in VERBS


def test_commands_are_found():
    assert len(commands()) >= 6


def test_the_table_of_verbs_is_honest():
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| verbs |"))
    today, later = (set(re.findall(r"`(\w+)`", cell)) for cell in row.split("|")[2:4])
    assert today == set(VERBS)
    assert not later & set(VERBS)
