"""docs/captions.md names every setting, and its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from lorakit.captioning import WRITERS
from lorakit.captioning.facts import IPTC
from lorakit.captioning.tagger import Thresholds
from lorakit.cli.main import parser

PAGE = (Path(__file__).parents[2] / "docs" / "captions.md").read_text()


@pytest.mark.parametrize("kind", WRITERS.names())
def test_every_setting_is_named_with_its_kind(kind: str) -> None:
    reference = PAGE.partition("## Settings")[2]
    general, own = reference.partition("`vlm`:")[0], reference.partition(f"\n`{kind}`:")[2].partition("\n\n`")[0]
    for name in WRITERS.module(kind).Settings.model_fields:
        assert f"`{name}`" in own or f"`{name}`" in general, name


def test_fields_and_categories_are_named() -> None:
    for name in (*IPTC, *Thresholds.model_fields):
        assert f"`{name}`" in PAGE or f"iptc.{name}" in PAGE, name


def commands() -> list[str]:
    return re.findall(r"^    lorakit (.*?)(?:  .*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_parses(command: str) -> None:
    arguments, rest = parser().parse_known_args(shlex.split(command))
    assert arguments.folder == Path("photos")
    assert all("=" in word for word in rest), "settings alone may stand behind options"


def test_commands_are_found() -> None:
    assert len(commands()) == 10
