"""lorakit/sampling/prompts.py: each prompt with what is its own, and every wrong key named."""

from pathlib import Path

import pytest

from lorakit.core.errors import InputError
from lorakit.sampling.pictures import Request
from lorakit.sampling.prompts import Prompt, read_prompts, requests_for

FILE = """
[[prompts]]
prompt = "a zorp"
seed = 7

[[prompts]]
prompt = "grass"
negative_prompt = ""
width = 72
height = 56
"""


def test_what_a_prompt_does_not_say_is_the_commands(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(FILE)
    wanted = requests_for(
        read_prompts(tmp_path / "p.toml"), count=2, seed=3, negative_prompt="red", width=64, height=64
    )
    assert wanted == [
        Request("a zorp", 7, "red", 64, 64),
        Request("a zorp", 8, "red", 64, 64),
        Request("grass", 5, "", 72, 56),
        Request("grass", 6, "", 72, 56),
    ]


def test_seeds_are_counted_over_all_pictures() -> None:
    wanted = requests_for([Prompt(prompt="a"), Prompt(prompt="b")], count=3, seed=10)
    assert [request.seed for request in wanted] == list(range(10, 16))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[prompts]]\nprompt = "a"\nsed = 1', r"p.toml: prompts.0.sed is not a setting .* Did you mean seed\?"),
        ("[[prompts]]\nseed = 1", "prompts.0.prompt is missing"),
        ('[[prompts]]\nprompt = "a"\nwidth = 0', "prompts.0.width = 0"),
        ("prompts = []", "prompts = "),
        ("a zorp", "is no TOML file"),
        ("", "prompts is missing"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path / "p.toml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--prompts .*p.toml cannot be read"):
        read_prompts(tmp_path / "p.toml")
