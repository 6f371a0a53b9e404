"""Trainings that hold the model to what it was, from end to end, and what is refused before a model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lorakit import families
from lorakit.adapters.state import trainable_parameters
from lorakit.core.errors import InputError
from lorakit.data.cache import Filled
from lorakit.data.loader import Loader
from lorakit.recipe import Recipe
from lorakit.training.step import predictor
from lorakit.verbs import train as module
from lorakit.verbs.cache import fill
from lorakit.verbs.train import resume, train

Make = Callable[..., Recipe]
KINDS = {
    "differential_output": ["data.sources.0.class_words.thing=x", "data.sources.0.caption_dropout=0.2"],
    "blank_prompt": [],
    "masked_prior": [],
}
LIVE = ["adapter.text_encoder.rank=2"]


def lines(run: Path) -> list[dict]:  # type: ignore[type-arg]
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.fixture
def make(make_recipe: Make, tmp_path: Path) -> Make:
    """Recipes of three steps on pictures of which some have masks."""

    def made(name: str, kind: str | None, *overrides: str) -> Recipe:
        kept = [] if kind is None else [f"objective.preservation.kind={kind}", *KINDS[kind]]
        recipe = make_recipe(name, "run.steps=3", "run.save_every=2", *kept, *overrides)
        for photo in sorted((tmp_path / "photos").glob("*[0-4].png")):
            mask = Image.new("L", Image.open(photo).size, 255)
            mask.paste(0, (0, 0, mask.width // 2, mask.height))
            mask.save(photo.with_suffix(".mask.png"))
        return recipe

    return made


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        pytest.param("differential_output", [], id="differential_output-cached"),
        pytest.param("differential_output", LIVE, id="differential_output-live"),
        pytest.param("blank_prompt", [], id="blank_prompt-cached"),
        pytest.param("masked_prior", LIVE, id="masked_prior-live"),
    ],
)
def test_each_kind_trains_and_goes_on_bit_for_bit(make: Make, kind: str, how: list[str]) -> None:
    whole = train(make("whole", kind, *how)).output
    first, *later = lines(whole)
    assert first["preservation"] == 0, "an adapter that changes nothing has drifted nowhere"
    assert all(0 < line["preservation"] < line["loss"] for line in later)
    killed = Path(shutil.copytree(whole, whole.parent / "killed"))
    shutil.rmtree(killed / "checkpoints" / "step-000003")
    (killed / "adapter.safetensors").unlink()
    assert resume(killed).steps == 3
    assert lines(killed) == lines(whole)
    assert (killed / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_batch_may_be_split_otherwise(make: Make, kind: str) -> None:
    how = ["data.sources.0.weight=0.5", "objective.preservation.weight=3"]
    one = lines(train(make("one", kind, "run.batch_size=4", "run.accumulate=1", *how)).output)
    other = lines(train(make("other", kind, "run.batch_size=1", "run.accumulate=4", *how)).output)
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "preservation", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_the_first_step_is_that_of_a_training_without(make: Make) -> None:
    """There the term has neither value nor gradient; later it pulls."""
    how = ["run.validate_every=1", "data.validation=0.3"]
    runs = {kind: train(make(str(kind), kind, *how)).output for kind in (None, "blank_prompt", "masked_prior")}
    plain = lines(runs.pop(None))
    assert "preservation" not in plain[0]
    for run in runs.values():
        for name in ("loss", "grad_norm"):
            assert lines(run)[0][name] == plain[0][name]
        assert lines(run)[2]["losses"] != plain[2]["losses"]
        # what is measured is denoising alone: before and after the first step the same, for the adapter is
        measured, of_plain = (
            [json.loads(line)["loss"] for line in (path / "validation.jsonl").read_text().splitlines()]
            for path in (run, run.parent / "None")
        )
        assert measured[:2] == of_plain[:2] and measured[3] != of_plain[3]


def test_the_cache_is_filled_with_what_captions_are_compared_with(make: Make) -> None:
    recipe = make("run", "differential_output")
    assert fill(recipe).captions == Filled(15, 0)  # seven captions, as many class texts, and none
    assert fill(recipe).captions == Filled(0, 15)
    assert fill(make("run", "blank_prompt")).captions == Filled(0, 8)


def test_without_the_adapter_the_text_encoder_is_the_base_s_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that read texts through the trained encoder would drift along with its pupil."""
    seen = []

    def looked(trainee, batch, **settings):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        text_encoder = {"text_encoder": trainee.adapted["text_encoder"]}
        for name, parameter in trainable_parameters(text_encoder).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.5)
        predict = predictor(trainee, batch)
        x_t, t = torch.randn(len(batch.keys), 4, *batch.noise.shape[-2:]), torch.full((len(batch.keys),), 500)
        base = families.load_settings(recipe.model)
        with torch.no_grad():
            expected = base.predict(x_t, t, base.encode_text(batch.captions), sizes=batch.sizes)
            of_class = base.predict(x_t, t, base.encode_text(["x"] * len(batch.keys)), sizes=batch.sizes)
            torch.testing.assert_close(predict(x_t, t, adapter=False), expected)
            torch.testing.assert_close(predict(x_t, t, text=["x"] * len(batch.keys), adapter=False), of_class)
            assert not torch.allclose(predict(x_t, t), expected, atol=1e-3)
        seen.append(True)
        raise InputError("enough")

    monkeypatch.setattr(module, "dry_step", looked)
    monkeypatch.setattr(Loader, "is_largest", lambda *_: False)  # else the first step does for it
    recipe = make("run", "differential_output", *LIVE)
    with pytest.raises(InputError, match="enough"):
        train(recipe)
    assert seen


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["kind=differential_output"], 'objective.preservation.kind = "differential_output" asks what else'),
        (["kind=masked_prior"], 'objective.preservation.kind = "masked_prior" holds what lies outside of masks'),
        (["kind=blank_prompt", "class_words.thing=x"], 'data.sources.0.class_words: objective.preservation.kind = "bl'),
        (["kind=differential_output", "class_words.thng=x"], "data.sources.0.class_words: 'thng' is in none of its"),
        (["kind=differential_output", "class_words.thing=x", "weight=0"], "objective.preservation.weight = 0"),
        (["kind=none", "weight=1"], "objective.preservation.weight is not a setting of denoising"),
    ],
)
def test_what_says_nothing_is_refused_before_a_model_is_loaded(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str], problem: str
) -> None:
    monkeypatch.setattr(families, "load_settings", lambda *args: pytest.fail("a model was loaded"))
    keys = [
        f"{'data.sources.0' if override.startswith('class') else 'objective.preservation'}.{override}"
        for override in overrides
    ]
    for act in (train, fill):
        with pytest.raises(InputError) as caught:
            act(make_recipe("run", *keys))
        assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)


def test_only_training_pictures_have_a_class(make_recipe: Make, tmp_path: Path) -> None:
    kept = f'data.sources.1={{path="{tmp_path}/photos", role="regularization", class_prompt="a thing"}}'
    with pytest.raises(InputError) as caught:
        train(make_recipe("run", "objective.preservation.kind=differential_output", kept))
    assert caught.value.problems[0].startswith("data.sources.1.class_prompt: only a source with role")
    assert len(caught.value.problems) == 2
