"""lorakit/families/unet.py: models that see more than x_t, handed what their stock pipelines hand over.

What those pipelines sample of the VAE's posterior is its mean here, as in all that is trained on.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from lorakit import families
from lorakit.adapters import adapter_state, trainable_parameters
from lorakit.core.errors import InputError
from lorakit.core.types import Task
from lorakit.export.probe import record_drawing
from lorakit.export.verify import write_verified
from lorakit.families import sd, sdxl, unet
from lorakit.sampling.pictures import Request, draw
from tests.families.test_protocol import adapt, assert_same, noisy, recorded

HEIGHT, WIDTH = 32, 48
MASK = torch.zeros(1, 1, HEIGHT, WIDTH)
MASK[..., 6:23, 11:40] = 1  # its edges lie between the latents


@pytest.fixture(params=[sd, sdxl], ids=["sd", "sdxl"])
def module(request: pytest.FixtureRequest) -> Any:
    return request.param


def made_for(module: Any, task: Task) -> families.Family:
    return module.load(module.Settings(path=str(module.tiny(task).path)))  # type: ignore[no-any-return]


def shown() -> Tensor:
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) * 2 - 1


def handed(
    family: families.Family, given: dict[str, Tensor], captions: list[str], asked: dict[str, Any], *, live: bool = False
) -> None:
    """That the U-Net gets of a stock pipeline that is `asked` so what it gets of the family, which is `given` so."""
    pipeline = family.live_pipeline(family.task) if live else family.stock_pipeline()

    def draw_stock() -> None:
        pipeline(
            next(caption for caption in captions if caption),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **asked,
        )

    stock = recorded(pipeline.unet, draw_stock)
    x_t, t = stock["sample"][:, :4], torch.as_tensor(stock["timestep"])
    given = {name: x if len(x) > 1 else x.expand(len(x_t), *x.shape[1:]) for name, x in given.items()}

    def predict() -> None:
        beside = family.encode_given(given)
        text = family.encode_text(captions if len(x_t) > 1 else captions[:1])
        said = family.predict(x_t, t.expand(len(x_t)), text, beside=beside)
        assert said.shape == x_t.shape

    own = recorded(family.components["unet"], predict)
    assert own.keys() == stock.keys()
    for name in stock:
        assert_same(own[name], stock[name], name)


def test_an_inpainting_model_sees_mask_and_masked_picture_as_from_its_stock_pipeline(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    family = made_for(module, "inpaint")
    given = {"pixels": shown(), "mask": MASK}
    # the pipeline takes tensors of pixels in 0 … 1 or -1 … 1, and tells them apart by their smallest
    asked = {"image": shown(), "mask_image": MASK, "strength": 1.0}
    handed(family, given, ["", "a red circle"], asked)


def test_an_editing_model_sees_a_picture_as_from_its_stock_pipeline(module: Any) -> None:
    """Guided, that asks thrice: with both, without the text, and without either."""
    family = made_for(module, "edit")
    given = {"pixels": shown(), "dropped": torch.tensor([0.0, 0.0, 1.0])}
    handed(family, given, ["a red circle", "", ""], {"image": shown(), "image_guidance_scale": 2.0})
    latents = family.encode_given({"pixels": shown()})
    assert torch.equal(family.encode_given({"latents": latents, "dropped": torch.zeros(1)}), latents)
    assert not family.encode_given({"latents": latents, "dropped": torch.ones(1)}).any()


def test_long_captions_reach_an_editing_model_whole(module: Any) -> None:
    family = module.load(module.Settings(path=str(module.tiny("edit").path), caption_chunks=2))
    given = {"pixels": shown(), "dropped": torch.tensor([0.0, 0.0, 1.0])}
    handed(family, given, ["a b c d e f g h i j k l m n o p q", "", ""], {"image": shown()}, live=True)


def test_what_is_hidden_of_a_picture_is_not_seen() -> None:
    family = made_for(sd, "inpaint")
    pixels, other = shown(), shown()
    other[(MASK == 1).expand_as(other)] = 0.7
    assert torch.equal(
        family.encode_given({"pixels": pixels, "mask": MASK}), family.encode_given({"pixels": other, "mask": MASK})
    )
    other[..., 0, 0] += 0.1
    assert not torch.equal(
        family.encode_given({"pixels": pixels, "mask": MASK}), family.encode_given({"pixels": other, "mask": MASK})
    )


def test_where_nothing_is_given_nothing_is_shown() -> None:
    family = made_for(sd, "inpaint")
    x_t, t = noisy(family)
    side = x_t.shape[-1] * family.side_multiple
    given = {"pixels": torch.rand(2, 3, side, side), "mask": torch.ones(2, 1, side, side)}
    text = family.encode_text(["a", "b"])
    told = family.predict(x_t, t, text, beside=family.encode_given(given))
    assert torch.equal(family.predict(x_t, t, text), told)
    family = made_for(sd, "edit")
    told = family.predict(x_t, t, text, beside=torch.zeros_like(x_t))
    assert torch.equal(family.predict(x_t, t, text), told)


@pytest.mark.parametrize("task", ["inpaint", "edit"])
def test_an_adapter_gives_the_same_picture_in_a_fresh_stock_pipeline(module: Any, task: Task, tmp_path: Path) -> None:
    family = made_for(module, task)
    assert family.task == families.describe(family.name, str(family.path)).task == task
    assert families.named_at(str(family.path)) == family.name
    state = adapter_state(trained(adapt(family)))
    report = write_verified(state, tmp_path / "a.safetensors", family=family)
    assert report.reader == "stock pipeline"
    picture = Image.fromarray(((shown()[0] + 1) * 127.5).byte().movedim(0, -1).numpy())
    mask = Image.fromarray((MASK[0, 0] * 255).byte().numpy()) if task == "inpaint" else None
    request = Request("a red circle", 1, width=WIDTH, height=HEIGHT, image=picture, mask=mask)
    stock = family.stock_pipeline()

    def drawn(pipeline: Any) -> np.ndarray:
        return np.asarray(draw(pipeline, [request], steps=2, guidance=3.0)[0], dtype=int)

    before = drawn(stock)
    stock.load_lora_weights(tmp_path, weight_name="a.safetensors")
    after = drawn(stock)
    assert np.abs(after - before).max() > 8
    assert np.abs(after - drawn(family.live_pipeline(task))).max() <= 1


def trained(parts: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    with torch.no_grad():
        for name, parameter in trainable_parameters(parts).items():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return parts


@pytest.mark.parametrize("task", ["inpaint", "edit"])
def test_its_stock_pipeline_draws_what_a_merge_is_verified_by(module: Any, task: Task) -> None:
    family = made_for(module, task)
    calls = record_drawing(family.stock_pipeline(), family).made["unet"]
    assert [args[0].shape[1] for args, _ in calls] == [unet.channels(task, 4)] * 2


def test_a_folder_is_what_its_channels_say(tmp_path: Path) -> None:
    """Not what its pipeline is called: inpainting models are passed on as plain ones, and plain ones in theirs."""
    folder = tmp_path / "model"
    shutil.copytree(sd.tiny("inpaint").path, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    family = families.load("sd", str(folder))
    assert family.task == "inpaint" and list(family.pipelines) == ["inpaint"]
    assert type(family.stock_pipeline()).__name__ == "StableDiffusionInpaintPipeline"
    (folder / "model_index.json").write_text(json.dumps({**index, "is_cosxl_edit": True}))
    with pytest.raises(InputError, match="scales the picture that it edits"):
        families.describe("sd", str(folder))
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 5}))
    with pytest.raises(InputError, match=r"its U-Net sees 5 channels, and here are known 4 \(text\), 9 \(inpaint\), 8"):
        families.describe("sd", str(folder))


def test_channels_are_counted_by_the_latents() -> None:
    assert [unet.channels(task, 4) for task in ("text", "inpaint", "edit")] == [4, 9, 8]
    assert unet.channels("inpaint", 16) == 33
