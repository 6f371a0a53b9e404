"""The small models, each made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.captioning.tiny_models import MODELS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the model of a type."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MODELS[name](tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder
