"""Prompts with settings of their own, from a file: what `lorakit sample --prompts FILE` reads.

[[prompts]]
prompt = "a zorp on a blue background"
seed = 7

[[prompts]]
prompt = "a zorp on grass"
negative_prompt = "red"
width = 72
height = 56
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Settings, validate
from lorakit.sampling.pictures import Request


class Prompt(Settings):
    prompt: str
    """What to draw."""
    negative_prompt: str | None = None
    """What the guidance leads away from. Left out: the command's."""
    seed: int | None = Field(None, ge=0)
    """Seed of its first picture; each further one takes the next. Left out: counted on from the command's."""
    width: int | None = Field(None, gt=0)
    """Pixels. Left out: the command's."""
    height: int | None = Field(None, gt=0)
    """Pixels. Left out: the command's."""


class PromptFile(Settings):
    prompts: list[Prompt] = Field(min_length=1)
    """The pictures to draw, in this order."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a TOML file; InputError names every key that is wrong."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--prompts {printable(path)} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--prompts {printable(path)} is no TOML file: {printable(error)}.") from None
    try:
        return validate(PromptFile, values, where="", name="a prompts file").prompts
    except InputError as error:
        raise InputError([f"--prompts {printable(path)}: {problem}" for problem in error.problems]) from None


def requests_for(
    prompts: Sequence[Prompt],
    *,
    count: int = 1,
    seed: int = 0,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
) -> list[Request]:
    """`count` pictures of each prompt; the n-th picture of all takes the seed `seed` + n, where none is said."""
    return [
        Request(
            prompt.prompt,
            seed + i * count + k if prompt.seed is None else prompt.seed + k,
            negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt,
            prompt.width or width,
            prompt.height or height,
        )
        for i, prompt in enumerate(prompts)
        for k in range(count)
    ]
