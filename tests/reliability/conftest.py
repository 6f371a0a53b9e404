"""The fork server that the reliability tests share, the mark `soak`, and the figures that a soak leaves.

`soak` tests run only where `-m` names them (`make soak`). Where LORAKIT_FIGURES names a file, each test here adds a
line to it: how often it tried (`record_property("trials", n)`), how it ended, how long it took.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.harness import Server
from tests.reliability.scene import write_recipe


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: minutes to hours; runs only by `make soak`, or where -m names it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in (config.option.markexpr or ""):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    file = os.environ.get("LORAKIT_FIGURES")
    if file and (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
        line = {
            "test": item.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            **dict(item.user_properties),
        }
        with open(file, "a", encoding="utf-8") as figures:
            figures.write(json.dumps(line) + "\n")
    return report


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def recipe(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """`recipe("name", "run.steps=3", …)`: a recipe's file, run into tmp_path/name; see `scene.write_recipe`."""
    return lambda name, *overrides: write_recipe(tmp_path, name, *overrides, model=server.model)
