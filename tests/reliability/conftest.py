"""The fork server that the reliability tests share, the mark `soak`, and the figures that a soak leaves.

`soak` tests run only where `-m` names them (`make soak`). Where LORAKIT_FIGURES names a file, each test here adds a
line to it: how often it tried (`record_property("trials", n)`), how it ended, how long it took; tests that have passed
there already are left out, so that a soak can be broken off and gone on with.
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
    wanted = "soak" in (config.option.markexpr or "")
    done = passed()
    out = [item for item in items if (item.get_closest_marker("soak") and not wanted) or item.nodeid in done]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def passed() -> set[str]:
    """The tests that have passed in the soak that is to go on."""
    file = Path(os.environ.get("LORAKIT_FIGURES", ""))
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {test for test, line in {line["test"]: line for line in lines}.items() if line["outcome"] == "passed"}


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
