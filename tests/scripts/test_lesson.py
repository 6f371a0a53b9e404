"""The page on latent diffusion: its links lead somewhere, its numbers are those that were measured, its script runs."""

import ast
import json
import re
from pathlib import Path

import lesson
import lesson_base
import lesson_diffusion
import pytest
import torch
from PIL import Image

import lorakit.diffusion
from lorakit import families
from lorakit.adapters import ADAPTERS, adapter_state, trainable_parameters
from lorakit.evaluation.judge import pixels_of
from lorakit.export import write_adapter
from lorakit.sampling.pictures import Request, draw

PAGE = lesson.PAGE.read_text(encoding="utf-8")
NUMBERS = json.loads((lesson.PICTURES / "numbers.json").read_text())
LINKS = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("https://")]
NAMED = re.findall(r"\[`([A-Za-z_]\w*(?:\.\w+)?)`\]\(([^)]+\.py)\)", PAGE)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded base, of the demo's shape, that changes something."""
    family = families.load("sd", "embedded")
    kind = ADAPTERS.module("lora")
    for component, rank in (("unet", 16), ("text_encoder", 8)):
        settings = kind.Settings(kind="lora", rank=rank)
        kind.inject(family.components[component], settings, targets=family.default_targets[component], seed=0)
    for name, parameter in trainable_parameters(family.components).items():
        if ".lora_B." in name:
            parameter.data.fill_(0.01)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(adapter_state(family.components), path, format="kohya", family=family)
    return path


@pytest.fixture(scope="module")
def model(adapter: Path) -> lesson_base.Model:
    return lesson_base.Model(lesson_base.QUICK, adapter)


def names(tree: ast.AST) -> set[str]:
    """Functions, classes and constants of a module, and the methods of its classes as Class.method."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{inner}" for inner in names(node)} if isinstance(node, ast.ClassDef) else set()
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_what_the_page_links_to_is_there() -> None:
    assert len(LINKS) > 40
    assert [link for link in LINKS if not (lesson.PAGE.parent / link).exists()] == []


def test_functions_are_where_the_page_says() -> None:
    functions = [(name, link) for name, link in NAMED if not name.endswith(".py")]
    assert len(functions) > 30
    for name, link in functions:
        file = lesson.PAGE.parent / link
        assert name in names(ast.parse(file.read_text(encoding="utf-8"))), f"{link} has no {name}"


def test_the_map_in_the_code_and_the_page_name_each_other_and_the_same_functions() -> None:
    text = lorakit.diffusion.__doc__ or ""
    assert "docs/latent-diffusion.md" in text and "lorakit/diffusion/__init__.py" in PAGE
    mapped = set(re.findall(r"`((?:GaussianDiffusion|RectifiedFlow)\.\w+)`", text))
    shown = {name for name, _ in NAMED if name.startswith(("GaussianDiffusion.", "RectifiedFlow."))}
    assert mapped == shown


def test_numbers_are_those_that_were_measured() -> None:
    assert lesson.into_page(PAGE, NUMBERS) == PAGE
    assert {name for _, name in lesson.MARKED.findall(PAGE)} == NUMBERS.keys()
    wrong = {**NUMBERS, "psnr": "0.0"}
    assert lesson.into_page(lesson.into_page(PAGE, wrong), NUMBERS) == PAGE != lesson.into_page(PAGE, wrong)
    assert len(re.findall("<!--", PAGE)) == len(lesson.MARKED.findall(PAGE))


def test_what_looks_measured_has_marks() -> None:
    plain = re.sub(r"\[[^]]*\]\([^)]*\)|sections? [\d.]+( and [\d.]+)?", "", lesson.MARKED.sub("", PAGE))
    given = {"0.1", "0.25", "0.5", "0.75", "1.25", "1.5"}  # what the script was told, and Stable Diffusion 1.5
    assert set(re.findall(r"\d+\.\d+|\d+\s?%", plain)) <= given


def test_pictures_are_all_shown_and_small() -> None:
    files = {path.relative_to(lesson.PAGE.parent).as_posix(): path for path in lesson.PICTURES.glob("*.png")}
    assert files.keys() == {link for link in LINKS if link.endswith(".png")}
    assert sum(path.stat().st_size for path in files.values()) < 600_000


def test_the_script_makes_them(adapter: Path, tmp_path: Path) -> None:
    lesson.main(["--adapter", str(adapter), "--quick", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in lesson.PICTURES.iterdir()}
    assert json.loads((tmp_path / "numbers.json").read_text()).keys() <= NUMBERS.keys()
    for path in tmp_path.glob("*.png"):
        made, kept = Image.open(path), Image.open(lesson.PICTURES / path.name)
        assert made.width <= kept.width <= 950 and made.height == kept.height, path.name
    assert lesson.PAGE.read_text(encoding="utf-8") == PAGE


@torch.no_grad()
def test_the_lesson_draws_what_the_stock_pipeline_draws(model: lesson_base.Model) -> None:
    noise = torch.randn((1, *model.family.latent_shape(64, 64)), generator=torch.Generator().manual_seed(5))
    drawn = model.draw(["a red circle on a blue background"], noise, steps=3, scale=4.0)[0]
    request = Request("a red circle on a blue background", 5)
    stock = draw(model.family.live_pipeline(), [request], steps=3, guidance=4.0)[0]
    assert (pixels_of(drawn) - pixels_of(stock)).abs().max() < 1.5 / 255


@torch.no_grad()
def test_listening_to_attention_changes_nothing_and_weights_add_up(
    model: lesson_base.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_t, t, captions = model.noise(2, "test"), lesson_base.at(300, 2), ["a red circle", "a green house"]
    predict, heard = model.predict, []
    monkeypatch.setattr(model, "predict", lambda *asked: heard.append(predict(*asked)))
    seen = lesson_diffusion.attention(model, x_t, t, captions)
    assert seen.shape == (2, 8, 8, model.family.token_limit)
    assert torch.allclose(seen.sum(-1), torch.ones(2, 8, 8), atol=1e-5)
    assert torch.allclose(heard[0], predict(x_t, t, captions), atol=1e-4)
