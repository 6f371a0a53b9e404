"""PixArt-Σ: what is particular to it. What all families keep: test_protocol.py."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as stock
from torch import Tensor

import lorakit
from lorakit import families
from lorakit.adapters import AdapterState, adapter_state, load_adapter_state, lora, trainable_parameters
from lorakit.adapters.state import load_with_peft
from lorakit.core.errors import InputError
from lorakit.export.verify import write_verified
from lorakit.families import pixart
from lorakit.families.protocol import Family
from lorakit.sampling.pictures import Request, draw

ADAPTER = "a.safetensors"
AS_ASKED = {"use_resolution_binning": False}  # or the stock pipeline scales what it draws at another size


def family(**settings: Any) -> Family:
    return families.load("pixart", str(pixart.tiny().path), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(pixart.tiny().path, tmp_path / "model"))


def rewrite(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def trained() -> AdapterState:
    """An adapter on the default targets that changes every layer."""
    parts = {"transformer": family().components["transformer"]}
    targets = family().default_targets["transformer"]
    lora.inject(parts["transformer"], lora.Settings(rank=2, alpha=3), targets=targets, seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(parts).items():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return adapter_state(parts)


def picture(pipeline: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="np", **AS_ASKED)
    return np.asarray(drawn.images)


# -- what the backbone says and is told -------------------------------------------------------------------------------


def test_the_scheduler_steps_with_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model = family().stock_pipeline(), family()
    steps: list[tuple[Tensor, ...]] = []
    step = pipeline.scheduler.step

    def listen(noise: Tensor, t: Tensor, x_t: Tensor, **given: Any) -> Any:
        steps.append((noise, t, x_t))
        return step(noise, t, x_t, **given)

    monkeypatch.setattr(pipeline.scheduler, "step", listen)
    pipeline("a", num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert pipeline.transformer.config.out_channels == 2 * steps[0][0].shape[1]
    for noise, t, x_t in steps:
        with torch.no_grad():
            torch.testing.assert_close(model.predict(x_t, t[None], model.encode_text(["a"])), noise)


def test_a_backbone_that_says_no_variance_is_heard_too(folder: Path) -> None:
    narrow = pixart.tiny().components["transformer"]
    config = {**narrow.config, "out_channels": 4}  # type: ignore[dict-item]
    type(narrow).from_config(config).save_pretrained(folder / "transformer")  # type: ignore[attr-defined]
    model = families.load("pixart", str(folder))
    x_t = torch.zeros(1, *model.latent_shape(32, 32))
    assert model.predict(x_t, torch.tensor([5]), model.encode_text(["a"])).shape == x_t.shape


def test_captions_are_read_in_lower_case_and_without_a_view_of_the_padding() -> None:
    short, long = family(max_sequence_length=20), family(max_sequence_length=40)
    one, same, more = short.encode_text([" A Dog\n"]), short.encode_text(["a dog"]), long.encode_text(["a dog"])
    assert torch.equal(one["states"], same["states"]) and torch.equal(one["mask"], same["mask"])
    own = int(one["mask"].sum())
    assert own < 20
    assert one["mask"].dtype == torch.int64
    torch.testing.assert_close(more["states"][:, :own], one["states"][:, :own], rtol=1e-5, atol=1e-6)


def test_where_captions_are_cleaned_further_training_reads_them_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    caption, pipeline, read = "A <b>Dog</b> (8k) http://example.org/x", family().stock_pipeline(), []
    plain = family().fingerprint("text_encoder"), family().encode_text([caption])
    # stand-ins for what is not installed
    monkeypatch.setattr(stock, "is_bs4_available", lambda: True)
    monkeypatch.setattr(stock, "is_ftfy_available", lambda: True)
    monkeypatch.setattr(stock, "BeautifulSoup", lambda text, features: SimpleNamespace(text=text), raising=False)
    monkeypatch.setattr(stock, "ftfy", SimpleNamespace(fix_text=str.strip), raising=False)
    monkeypatch.setattr(pixart, "_cleans", lambda: True)
    model = family()
    for encoder in (pipeline.text_encoder, model.components["text_encoder"]):
        encoder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    pipeline(caption, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    text = model.encode_text([caption])
    assert torch.equal(*read) and not torch.equal(text["mask"], plain[1]["mask"])
    assert text["mask"].sum() == families.describe("pixart", str(model.path)).count_tokens(caption)
    assert model.fingerprint("text_encoder") != plain[0], "cached conditioning is not mixed"
    with pytest.raises(InputError, match=r"weighted_tags: .*brackets"):
        model.encode_text([caption], weighted=True)


def test_emphasis_moves_states_where_brackets_stay() -> None:
    one, other = (family().encode_text(["a (DOG:1.5)"], weighted=weighted) for weighted in (True, False))
    assert not torch.equal(one["mask"], other["mask"])
    assert torch.equal(one["mask"], family().encode_text(["a dog"])["mask"])


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_what_is_drawn_is_what_the_stock_pipeline_draws_without_a_complaint(caplog: pytest.LogCaptureFixture) -> None:
    model = family()
    wanted = [Request("A dog", 3, negative, width=80, height=48) for negative in ("", "Blurry")]
    drawn = draw(model.live_pipeline(), wanted, steps=2, guidance=4.5, guided=pixart.tiny().guided)
    assert not caplog.records
    pipeline, generator = model.stock_pipeline(), torch.Generator()
    for found, request in zip(drawn, wanted, strict=True):
        size = {"width": request.width, "height": request.height, "num_inference_steps": 2}
        told = {"negative_prompt": request.negative_prompt} if request.negative_prompt else {}
        expected = pipeline(request.prompt, generator=generator.manual_seed(3), **size, **told, **AS_ASKED).images[0]
        assert found.size == (80, 48)
        assert np.array_equal(found, expected)
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_size_that_the_stock_pipeline_does_not_know_is_refused_by_its_file(folder: Path) -> None:
    rewrite(folder / "transformer" / "config.json", sample_size=96)
    for read in (families.load, families.describe):
        with pytest.raises(InputError, match=r"transformer/config\.json: sample_size = 96: .*32, 64, 128, 256"):
            read("pixart", str(folder))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_alpha_is_refused_by_name(folder: Path) -> None:
    rewrite(folder / "model_index.json", _class_name="PixArtAlphaPipeline")
    with pytest.raises(InputError, match=r"is a PixArtAlphaPipeline, and this family reads PixArtSigmaPipeline"):
        families.load("pixart", str(folder))


def test_the_published_folders_older_names_are_read(folder: Path) -> None:
    rewrite(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    # what the older class had beside
    older = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "use_linear_projection": False}
    rewrite(folder / "transformer" / "config.json", **older)
    state = trained()
    write_verified(state, folder / ADAPTER, family=families.load("pixart", str(folder)))
    assert families.outline(str(folder)).name == "pixart"
    lorakit.merge_adapter(str(folder), [(folder / ADAPTER, 1.0)], out=folder.parent / "merged")
    merged = families.load("pixart", str(folder.parent / "merged")).stock_pipeline()
    model = family()
    load_adapter_state(model.components, state)
    assert np.abs(picture(merged) - picture(model.live_pipeline())).max() < 1e-4


# -- adapters, which the stock pipeline has no loader for --------------------------------------------------------------


def test_an_adapter_is_put_in_by_lorakit_or_peft_and_draws_what_training_drew(tmp_path: Path) -> None:
    state, model = trained(), family()
    load_adapter_state(model.components, state)
    wanted = picture(model.live_pipeline())
    report = write_verified(state, tmp_path / ADAPTER, family=family())
    assert (report.format, report.reader) == ("diffusers", "lorakit")
    pipeline = family().stock_pipeline()
    assert not hasattr(pipeline, "load_lora_weights")
    assert np.abs(picture(pipeline) - wanted).max() > 1e-2
    assert lorakit.load_adapter(pipeline, tmp_path / ADAPTER).layers == {"transformer": len(state.layers())}
    assert np.array_equal(picture(pipeline), wanted)
    report = write_verified(state, tmp_path / "peft", family=family(), format="peft")
    assert report.reader == "peft"
    pipeline = family().stock_pipeline()
    load_with_peft(pipeline.transformer, tmp_path / "peft" / "transformer")  # into its layers
    assert np.array_equal(picture(pipeline), wanted)


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("transformer_blocks.0.attn2.to_k", True),
        ("transformer_blocks.0.ff.net.2", True),
        ("adaln_single.emb.timestep_embedder.linear_1", True),
        ("transformer_blocks.0.ff.conv_inverted", False),  # Sana
        ("transformer_blocks.0.attn.to_q", False),  # Stable Diffusion 3, FLUX, Qwen-Image
        ("layers.0.attn.to_q", False),  # Lumina 2
    ],
)
def test_files_are_told_by_their_layers(path: str, own: bool) -> None:
    assert pixart.recognises([f"transformer.{path}.lora_A.weight"]) == own
