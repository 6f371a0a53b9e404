"""Recipes: every wrong key at once, overrides as TOML, paths anchored where they were written."""

import tomllib
from pathlib import Path

import pytest

from lorakit.core.errors import InputError
from lorakit.recipe import Recipe, build, changed_keys, load_recipe

SOURCE = {"data": {"sources": [{"path": "/p"}]}, "run": {"output": "/o"}}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def problems(values: dict) -> list[str]:  # type: ignore[type-arg]
    with pytest.raises(InputError) as caught:
        build(values)
    return caught.value.problems


def test_defaults_are_written_out_and_read_back_to_the_same_recipe() -> None:
    recipe = build(SOURCE)
    text = recipe.to_toml()
    assert build(tomllib.loads(text)) == recipe
    values = tomllib.loads(text)
    assert values["adapter"]["rank"] == 16 and values["optimizer"]["lr"] == 1e-4 and values["run"]["steps"] == 1000


def test_what_is_measured_never_is_refused() -> None:
    (problem,) = problems({**SOURCE, "run": {"output": "/o", "validate_every": 0, "validate_training": 4}})
    assert "validate_training has no effect with validate_every = 0" in problem


def test_an_unknown_key_names_its_neighbour() -> None:
    assert problems({**SOURCE, "adapter": {"rnak": 4}}) == ["adapter.rnak is not a setting of lora. Did you mean rank?"]


def test_all_problems_come_at_once() -> None:
    found = problems(
        {
            **SOURCE,
            "adaptor": {},
            "adapter": {"rank": "16"},
            "optimizer": {"lr": -1.0, "schedule": {"kind": "cosin"}},
            "run": {"output": "/o", "steps": 5, "epochs": 1},
        }
    )
    assert len(found) == 5
    text = "\n".join(found)
    for part in ("adaptor is not a section", "Did you mean adapter?", "adapter.rank = '16'", "optimizer.lr = -1.0"):
        assert part in text
    assert "optimizer.schedule.kind = 'cosin'" in text and "run.steps and run.epochs" in text


def test_unknown_kinds_say_what_there_is() -> None:
    assert problems({**SOURCE, "model": {"family": "sdd"}}) == ["model.family = 'sdd' is no family. Did you mean sd?"]
    assert "adamw" in problems({**SOURCE, "optimizer": {"kind": "adam"}})[0]


def test_the_result_must_be_a_file_of_a_known_format() -> None:
    assert build({**SOURCE, "run": {"output": "/o", "format": "diffusers"}}).run.format == "diffusers"
    assert "Did you mean kohya?" in problems({**SOURCE, "run": {"output": "/o", "format": "koyha"}})[0]
    assert "lorakit export RUN --format peft" in problems({**SOURCE, "run": {"output": "/o", "format": "peft"}})[0]


def test_an_empty_path_is_no_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["run.output", "data.cache", "model.path", "adapter.init_from", "sample.image", "data.sources.0.path"]
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, '[[data.sources]]\npath = "p"\n'), overrides=[f"{key}=" for key in keys])
    assert sorted(caught.value.problems) == sorted(f"{key} is empty: name a path." for key in keys)
    with pytest.raises(InputError, match=r"data.cache is empty"):
        load_recipe(write(tmp_path, '[[data.sources]]\npath = "p"\n[data]\ncache = ""\n'))


@pytest.mark.parametrize("fit", ["0GB", "1MB", "8 GB"])
def test_an_amount_of_memory_is_above_0_and_in_gigabytes(fit: str) -> None:
    (problem,) = problems({**SOURCE, "run": {"output": "/o", "fit": fit}})
    assert problem == f'run.fit: {fit!r} is no amount of memory: write "auto", or more than 0 like "8GB" or "7.5GB".'
    assert build({**SOURCE, "run": {"output": "/o", "fit": "0.5GB"}}).run.fit == "0.5GB"


def test_a_table_without_a_kind_is_of_the_default_one_where_it_has_its_settings() -> None:
    made = build({**SOURCE, "objective": {"timesteps": {"min": 0.5}, "loss": {}}}).objective
    assert (made.timesteps.kind, made.timesteps.min, made.loss.kind) == ("uniform", 0.5, "mse")
    (problem,) = problems({**SOURCE, "objective": {"weighting": {"gamma": 5.0}}})
    assert problem.startswith("objective.weighting.kind is missing: it is one of none, min_snr, ")


def test_no_sources_is_an_error() -> None:
    assert "data.sources is missing" in problems({"run": {"output": "/o"}})[0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_not_a_number(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f'[[data.sources]]\npath = "p"\n[optimizer]\nlr = {value}\n')
    with pytest.raises(InputError, match="optimizer.lr"):
        load_recipe(path)


def test_lists_of_the_recipe_become_tuples_where_the_setting_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, '[[data.sources]]\npath = "p"\n[optimizer]\nbetas = [0.8, 0.99]\n')
    assert load_recipe(path).optimizer.betas == (0.8, 0.99)


def test_overrides_are_toml_else_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, '[[data.sources]]\npath = "p"\n')
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        path,
        overrides=["run.steps=7", "optimizer.lr=5e-5", "sample.prompts=['a b']", "data.sources.0.trigger=zorp"],
    )
    assert (recipe.run.steps, recipe.optimizer.lr, recipe.sample.prompts) == (7, 5e-5, ["a b"])
    assert recipe.data.sources[0].trigger == "zorp"


def test_an_override_may_add_a_source_and_a_section(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""), overrides=["data.sources.0.path=/x", "adapter.text_encoder.rank=4"])
    assert recipe.data.sources[0].path == "/x" and recipe.adapter.text_encoder.rank == 4


@pytest.mark.parametrize("override", ["run.steps", "=5", "run..steps=5", "data.sources.3.path=x", "run.seed.x=1"])
def test_a_bad_override_is_named(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, '[[data.sources]]\npath = "p"\n[run]\nseed = 1\n')
    with pytest.raises(InputError, match=override.split("=")[0].split(".")[0] or "="):
        load_recipe(path, overrides=[override])


def test_relative_paths_start_at_the_recipe_and_of_overrides_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    path = tmp_path / "recipes" / "r.toml"
    path.write_text('[model]\npath = "../base"\n[[data.sources]]\npath = "photos"\n[data]\ncache = "c"\n')
    recipe = load_recipe(path)
    assert recipe.data.sources[0].path == str(tmp_path / "recipes" / "photos")
    assert recipe.data.cache == str(tmp_path / "recipes" / "c")
    assert Path(recipe.model.path).resolve() == tmp_path / "base"
    assert recipe.run.output == str(here / "runs" / "r")
    changed = load_recipe(path, overrides=["data.sources.0.path=mine", "run.output=out"])
    assert changed.data.sources[0].path == str(here / "mine")
    assert changed.run.output == str(here / "out")


def test_hub_names_and_embedded_are_no_paths(tmp_path: Path) -> None:
    for name in ("embedded", "somebody/some-model"):
        recipe = load_recipe(write(tmp_path, f'[model]\npath = "{name}"\n[[data.sources]]\npath = "p"\n'))
        assert recipe.model.path == name


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[run\n", "not valid TOML"), (b"\xff\xfe", "not UTF-8"), (None, "does not exist")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_without_paths_a_recipe_names_no_folder() -> None:
    recipe = build({"data": {"sources": [{"path": "/home/me/photos"}], "cache": "/c/d"}, "run": {"output": "/o/run"}})
    text = recipe.to_toml(paths=False)
    assert "/" not in text
    assert 'path = "photos"' in text and 'output = "run"' in text


def test_changed_keys_are_dotted() -> None:
    before = build(SOURCE)
    after: Recipe = build({"data": {"sources": [{"path": "/q"}]}, "run": {"output": "/o"}, "adapter": {"rank": 4}})
    assert changed_keys(before.to_dict(), after.to_dict()) == ["adapter.rank", "data.sources.0.path"]
