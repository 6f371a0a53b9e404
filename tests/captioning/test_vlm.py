"""Vision-language models of every type write what their stock classes write, batches or not; what is wrong is told."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.captioning import check_settings, load_writers, validate_settings, vlm
from lorakit.captioning.pictures import Picture, seen
from lorakit.captioning.prompts import manner_of
from lorakit.captioning.protocol import one_line
from lorakit.core.errors import InputError
from tests.captioning.tiny_models import MODELS

Tiny = Callable[[str], Path]


def picture(seed: int, size: tuple[int, int]) -> Picture:
    noise = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).save(file, "png")
    return Picture(f"{seed}.png", file.getvalue)


PICTURES = [picture(i, size) for i, size in enumerate([(48, 48), (80, 40), (40, 64)])]


def writer(model: Path, **more: Any) -> Any:
    settings = validate_settings({"model": str(model), "max_tokens": 8, "dtype": "fp32", **more})
    check_settings(settings)
    return load_writers(settings, root=Path(), device="cpu")


def refusal(model: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        writer(model, **more)
    return str(caught.value)


def stock(folder: Path, image: Image.Image, prompt: str) -> str:
    """What a model says of one picture by its stock classes, asked as its own documentation shows it."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    name = model.config.model_type
    if name.startswith("qwen"):
        tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
        inputs = dict(images([image], return_tensors="pt"))
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        count = int(inputs["image_grid_thw"][0].prod()) // 4
        inputs |= tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    else:
        processor = AutoProcessor.from_pretrained(folder)
        tokenizer = processor.tokenizer
        if processor.chat_template:
            prompt = processor.apply_chat_template(message, add_generation_prompt=True)
        inputs = processor(images=image, text=prompt or None, return_tensors="pt")
    given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    if name == "blip":
        given -= bool(prompt)
    return one_line(tokenizer.decode(tokens if name == "florence2" else tokens[given:], skip_special_tokens=True))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "smolvlm"])
def test_it_writes_what_the_stock_classes_write_alone_and_in_batches(tiny_model: Tiny, name: str) -> None:
    folder, more = tiny_model(name), {} if name == "florence2" else {"prompts": ["what is it"]}
    write = writer(folder, **more)
    manner = manner_of(json.loads((folder / "config.json").read_text())["model_type"])
    prompt = manner.mark + (more.get("prompts") or [manner.styles["short"]])[0]
    expected = [(stock(folder, seen(each, longest=1024), prompt),) for each in PICTURES]
    assert [said for each in PICTURES for said in write([each])] == expected
    assert write(PICTURES) == expected
    assert len(set(expected)) > 1 and all(text for (text,) in expected)


def test_smolvlm_reads_pictures_as_idefics3_does(tiny_model: Tiny) -> None:
    """They are one architecture, and with equal weights they say the same."""
    said = [writer(tiny_model(name), prompts=["what"])(PICTURES) for name in ("idefics3", "smolvlm")]
    assert said[0] == said[1] and len(set(said[0])) == 3


@pytest.mark.parametrize("name", ["blip", "blip_2"])
def test_without_a_prompt(tiny_model: Tiny, name: str) -> None:
    folder = tiny_model(name)
    (text,) = writer(folder)(PICTURES[:1])[0]
    assert text == stock(folder, seen(PICTURES[0], longest=1024), "")


def test_each_style_and_prompt_makes_a_caption(tiny_model: Tiny) -> None:
    folder = tiny_model("qwen2_vl")
    both = writer(folder, styles=["short", "subject"], trigger="qzx")(PICTURES)
    assert [len(texts) for texts in both] == [2, 2, 2]
    assert [texts[:1] for texts in both] == writer(folder)(PICTURES), "short is the style where none is named"
    other = writer(folder, styles=["short", "subject"], trigger="rex")(PICTURES)
    assert all(a[0] == b[0] and a[1] != b[1] for a, b in zip(both, other, strict=True))
    assert both == writer(
        folder, prompts=[manner_of("x").styles["short"], manner_of("x").styles["subject"].format(trigger="qzx")]
    )(PICTURES)


def test_drawn_words_differ_and_follow_from_the_seed(tiny_model: Tiny) -> None:
    folder, how = tiny_model("qwen2_vl"), {"captions": 2, "temperature": 1.5}
    first, second = writer(folder, **how)(PICTURES[:1])[0]
    before = torch.random.get_rng_state()
    writer(folder)(PICTURES[:1])
    assert first != second and writer(folder, **how)(PICTURES[:1])[0] == (first, second)
    assert torch.equal(before, torch.random.get_rng_state()), "nobody else's numbers are drawn"
    assert writer(folder, seed=1, **how)(PICTURES[:1])[0][0] != first


def test_the_same_model_twice_is_loaded_once(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loads, load = str(tiny_model("qwen2_vl")), [], vlm._model
    monkeypatch.setattr(vlm, "_model", lambda *of: loads.append(1) or load(*of))
    monkeypatch.setattr(vlm, "_LOADED", {})
    again = {"model": folder, "styles": ["tags"], "max_tokens": 4, "dtype": "fp32", "prefix": "tags:"}
    write = writer(Path(folder), combine=again, suffix="end")
    assert len(loads) == 1
    sentence, tags = (
        writer(Path(folder), **how)(PICTURES)[0][0] for how in ({}, {"styles": ["tags"], "max_tokens": 4})
    )
    separator = " " if sentence[-1] in ".!?,;" else ", "
    assert write(PICTURES)[0] == (f"{sentence}{separator}tags: {tags} end",)


def test_bf16_and_tokens(tiny_model: Tiny) -> None:
    folder = tiny_model("blip")
    assert all(text for (text,) in writer(folder, dtype="bf16")(PICTURES))
    assert len(writer(folder, max_tokens=2)(PICTURES)[0][0]) < len(writer(folder, max_tokens=9)(PICTURES)[0][0])


def test_names_of_what_florence_finds() -> None:
    class Tokenizer:
        all_special_tokens = ("<s>", "</s>", "<loc_1>", "<loc_2>")

    assert vlm._names("</s><s>dog<loc_1><loc_2>red ball<loc_2><loc_2>dog<loc_1></s>", Tokenizer()) == "dog, red ball"
    assert one_line(vlm._names("</s><s>a dog</s>", Tokenizer())) == "a dog"


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        ("Dog, red ball, dog.", "dog, red ball"),
        ("1. dog\n2. 3 balls\n", "dog, 3 balls"),
        ("- Dog\n- grass; sky\n\n* 1girl", "dog, grass, sky, 1girl"),
    ],
)
def test_a_list_of_tags_is_read_whatever_its_form(answer: str, tags: str) -> None:
    assert vlm._tags(answer) == tags


def test_what_a_model_cannot_do_is_told(tiny_model: Tiny) -> None:
    blip = tiny_model("blip")
    assert "does not know tags, only short" in refusal(blip, styles=["tags"])
    assert "quantize = 4bit needs a GPU" in refusal(blip, quantize="4bit") or torch.cuda.is_available()
    assert "fp16 needs a GPU" in refusal(blip, dtype="fp16") or torch.cuda.is_available()
    assert "give a temperature" in refusal(blip, captions=2)
    assert refusal(blip, styles=["subject"]).startswith("the style subject and a trigger")
    with pytest.raises(InputError, match="does not take the prompt"):
        writer(tiny_model("florence2"), prompts=["<CAPTION> of a dog"])(PICTURES)


def changed(model: Path, to: Path, config: dict[str, Any]) -> Path:
    shutil.copytree(model, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return to


def test_folders_of_other_kinds(tiny_model: Tiny, tmp_path: Path) -> None:
    blip, qwen = tiny_model("blip"), tiny_model("qwen2_vl")
    assert "type clip, which writes no text" in refusal(changed(blip, tmp_path / "clip", {"model_type": "clip"}))
    pickled = changed(blip, tmp_path / "pickled", {})
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickles are not read" in refusal(pickled)
    deeper = json.loads((blip / "config.json").read_text())["text_config"] | {"num_hidden_layers": 3}
    assert "lacks" in refusal(changed(blip, tmp_path / "deeper", {"text_config": deeper}))
    mute = changed(qwen, tmp_path / "mute", {})
    (mute / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(mute)
    (mute / "tokenizer_config.json").write_text("{")
    assert "transformers does not load it" in refusal(mute)
    (mute / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refusal(mute)
    (mute / "config.json").write_text("{")
    assert "config.json could not be read" in refusal(mute)


def test_pictures_are_upright_opaque_and_not_too_large(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200), (9, 9, 9)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (30, 20), (9, 9, 9, 0)).save(tmp_path / "b.png")
    turned, clear = (seen(Picture("x", (tmp_path / name).read_bytes), longest=100) for name in ("a.jpg", "b.png"))
    assert turned.size == (67, 100) and clear.size == (30, 20) and clear.getpixel((3, 3)) == (255, 255, 255)
