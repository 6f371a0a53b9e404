"""Sana: what is particular to it. What all families keep: test_protocol.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.families import sana, sd
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample

# as the conversion of the published models writes it
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(sana.tiny().path, tmp_path / "model"))


@pytest.mark.parametrize("part", sana.PARTS)
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        families.load("sana", str(folder))


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline.*model\.family"):
        families.load("sana", str(sd.tiny().path))
    with pytest.raises(InputError, match=r"SanaPipeline.*model\.family"):
        families.load("sd", str(sana.tiny().path))


def test_sprint_is_refused_by_name_with_what_to_do(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "SanaSprintPipeline"}))
    for read in (families.load, families.describe):
        with pytest.raises(InputError, match="SanaSprint, .*the Sana that it was made from"):
            read("sana", str(folder))


def test_emphasis_is_refused() -> None:
    with pytest.raises(InputError, match="weighted_tags: captions of Sana"):
        sana.tiny().encode_text(["a (dog:1.3)"], weighted=True)


def test_a_caption_comes_behind_the_instruction_and_an_empty_one_alone() -> None:
    family = sana.tiny()
    described = families.describe("sana", str(family.path))
    before = described.token_limit - sana.TOKENS + 2
    assert before == described.count_tokens("x") - 1 > sana.TOKENS
    assert [described.count_tokens(caption) for caption in ("", " ", "a dog")] == [1, 1, before + 5]
    text = family.encode_text(["", " ", "a dog"])
    # the start, and of what is instructed its last token
    assert text["mask"].sum(dim=1).tolist() == [1, 1, 2 + 5]
    assert text["states"].shape[1] == sana.TOKENS
    assert torch.equal(text["states"][0], text["states"][1])


def test_what_is_cached_goes_by_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("text_encoder", "vae")
    before = [sana.tiny().fingerprint(part) for part in parts]
    monkeypatch.setattr(sana, "_instruction", lambda: "Draw well: ")
    after = [sana.tiny().fingerprint(part) for part in parts]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_captions_are_read_in_lower_case_without_blanks_around_them() -> None:
    written, plain = sana.tiny().encode_text([" A Dog\n", "a dog"])["states"]
    assert torch.equal(written, plain)


def test_captions_of_several_lengths_are_asked_as_each_alone() -> None:
    family, captions = sana.tiny(), ["a", "a longer caption", ""]
    x_t, t = torch.randn(3, *family.latent_shape(32, 64)), torch.tensor([0.3, 0.7, 0.5])
    with torch.no_grad():
        together = family.predict(x_t, t, family.encode_text(captions))
        for i, caption in enumerate(captions):
            alone = family.predict(x_t[i : i + 1], t[i : i + 1], family.encode_text([caption]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def pixels(folder: Path, out: Path, **asked: Any) -> Image.Image:
    [file] = sample(str(folder), [], wanted=[Request("a", 1, **asked)], out=out, steps=2, guidance=3.0)
    return Image.open(file)


def test_a_drawing_has_the_size_that_was_asked_for_and_is_the_stock_pipelines(tmp_path: Path) -> None:
    drawn = pixels(sana.tiny().path, tmp_path, width=64, height=96)
    stock = sana.tiny().stock_pipeline()(
        "a",
        width=64,
        height=96,
        num_inference_steps=2,
        guidance_scale=3.0,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(1),
    )
    assert drawn.tobytes() == stock.images[0].tobytes()
    with pytest.raises(InputError, match="32"):
        pixels(sana.tiny().path, tmp_path, width=80, height=64)


def test_where_no_size_is_said_a_drawing_has_the_models_own(tmp_path: Path) -> None:
    own = families.describe("sana", str(sana.tiny().path)).resolution
    assert pixels(sana.tiny().path, tmp_path).size == (own, own) == (64, 64)


def test_the_scheduler_of_the_published_models_is_a_flows(folder: Path, tmp_path: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    family = families.load("sana", str(folder))
    assert (family.process.prediction_type, family.process.shift) == ("flow", 3.0)
    assert type(family.live_pipeline().scheduler).__name__ == SCHEDULER["_class_name"]
    assert pixels(folder, tmp_path / "drawn", width=32, height=32).size == (32, 32)


def test_files_of_pixart_are_not_its_own() -> None:
    attention = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert sana.recognises([attention])
    assert not sana.recognises([attention, "transformer.transformer_blocks.0.ff.net.2.lora_A.weight"])
