"""The recipes that ship: each loads, is short, and names the file behind each of its sections."""

import re
from pathlib import Path

import pytest

import lorakit

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"photos_cpu", "subject_gpu"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path, tmp_path):
    recipe = lorakit.load_recipe(path, overrides=["data.sources.0.path=elsewhere"])
    assert recipe.data.sources[0].path == str(Path.cwd() / "elsewhere")
    assert recipe.run.output.endswith(f"runs/{path.stem}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert 20 <= len(lines) <= 50
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_section_names_the_file_that_it_configures(path):
    recipe = lorakit.load_recipe(path)
    homes = dict(re.findall(r"^\[+([\w.]+)\]+ +# (lorakit/\S+\.py)", path.read_text(), re.MULTILINE))
    assert set(homes) >= {"model", "adapter", "data.sources", "data.buckets", "objective", "optimizer", "run", "sample"}
    for section, home in homes.items():
        settings = recipe
        for name in section.split("."):
            settings = getattr(settings, name)
        settings = settings[0] if isinstance(settings, list) else settings
        assert type(settings).__module__ == home.removesuffix(".py").replace("/", "."), section
