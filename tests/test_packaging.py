"""What `pip install` gets, and that the pinned environment is the one that the tests run in."""

import re
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lorakit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        yield set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lorakit").rglob("*.py")}
    assert modules <= wheel
    rest = {name for name in wheel - modules if not name.startswith(("lorakit/_data/", "lorakit-0"))}
    assert rest == {"lorakit/py.typed"}


@pytest.mark.parametrize("folder", ["base", "judge", "mascot", "recipes"])
def test_the_wheel_holds_what_ships_with_it(wheel, folder):
    source = ROOT / folder if folder == "recipes" else ROOT / "data" / folder
    files = {p.relative_to(source) for p in source.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert files
    assert {f"lorakit/_data/{folder}/{file}" for file in files} <= wheel


def test_the_version_is_said_once_and_the_same():
    assert lorakit.__version__ == PROJECT["version"]
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_is_pinned_within_its_bounds():
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    found = {canonical(name): version for name, version in pins().items()}
    for requirement in wanted:
        name, lowest = requirement.split(">=")
        numbers = [[int(n) for n in v.split(".") if n.isdigit()] for v in (found[canonical(name)], lowest)]
        assert numbers[0] >= numbers[1], requirement


@pytest.mark.skipif(not Path(sys.prefix, ".installed-test").exists(), reason="not the environment that make makes")
def test_all_that_is_installed_is_pinned_to_what_it_is():
    found = {canonical(name): version for name, version in pins().items()}
    # torch brings what its build for this machine needs; pip came with the environment
    brought = ("nvidia-", "cuda-", "triton", "pip", "lorakit")
    for package in metadata.distributions():
        name = canonical(package.metadata["Name"])
        # setuptools, once it is imported, shows what it has within itself
        if not name.startswith(brought) and "_vendor" not in Path(str(package.locate_file(""))).parts:
            assert found.get(name) == package.version.split("+")[0], name


def test_no_torchvision():
    assert "torchvision" not in {canonical(name) for name in pins()}
