"""lorakit/families/chroma.py: what of a caption is seen, in drawing and in checkpointed training too."""

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.families import chroma, flux, load
from lorakit.families.protocol import Family
from lorakit.recipe import build
from lorakit.verbs.trainee import components_to_adapt


def family(**settings: bool | int) -> Family:
    return load("chroma", str(chroma.tiny().path), **settings)


def batch(model: Family) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x_t = torch.randn(2, *model.latent_shape(32, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x_t, torch.tensor([0.3, 0.8]), dict(model.encode_text(["a red circle", ""]))


def moved(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """With other states where nothing is to be seen."""
    return {**text, "states": text["states"] + (1 - text["visible"]).unsqueeze(-1)}


def test_a_caption_and_one_more_token_are_visible() -> None:
    model = family(max_sequence_length=20)
    lengths = [len(model.tokenizer(c).input_ids) for c in ("a red circle", "")]  # type: ignore[attr-defined]
    assert batch(model)[2]["visible"].sum(dim=1).tolist() == [length + 1 for length in lengths]
    full = model.encode_text(["b" * 40])["visible"]
    assert full.shape == (1, 20) and full.all()


@pytest.mark.parametrize("true_mask", [False, True])
def test_what_is_not_visible_counts_unless_it_is_truly_masked(true_mask: bool) -> None:
    model = family(true_mask=true_mask)
    x_t, t, text = batch(model)
    with torch.no_grad():
        change = (model.predict(x_t, t, moved(text)) - model.predict(x_t, t, text)).abs().max()
    assert (change == 0) == true_mask


def test_a_true_mask_has_gradients() -> None:
    model = family(true_mask=True)
    x_t, t, text = batch(model)
    weight = model.components["transformer"].get_parameter("context_embedder.weight").requires_grad_()
    model.predict(x_t, t, text).square().mean().backward()
    assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any()


def test_pictures_are_drawn_with_the_mask_that_was_trained() -> None:
    handed: list[torch.dtype] = []
    for true_mask, task in ((False, "text"), (True, "text"), (True, "image")):
        pipeline = family(true_mask=true_mask).live_pipeline(task)
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: handed.append(kwargs["attention_mask"].dtype), with_kwargs=True
        )
        over = {"image": torch.zeros(1, 3, 32, 32), "strength": 1.0} if task != "text" else {}
        with torch.no_grad():
            pipeline("a", height=32, width=32, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **over)
    assert handed == [torch.float32, torch.bool, torch.bool]


def test_several_predictions_before_one_backward_keep_their_own_masks() -> None:
    model = family()
    x_t, t, text = batch(model)
    other = {**text, "visible": text["visible"].flip(0)}
    gradients = []
    for checkpointing in (False, True):
        transformer = model.components["transformer"].train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        weight = transformer.get_parameter("x_embedder.weight").requires_grad_()
        weight.grad = None
        (model.predict(x_t, t, text).square() + model.predict(x_t, t, other).abs()).mean().backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_an_adapter_of_the_text_encoder_is_refused_by_name() -> None:
    recipe = build(
        {
            "model": {"family": "chroma", "path": str(chroma.tiny().path)},
            "adapter": {"text_encoder": {"rank": 2}},
            "data": {"sources": [{"path": "photos"}]},
            "run": {"output": "run", "steps": 1},
        }
    )
    with pytest.raises(InputError, match=r"adapter\.text_encoder: the stock pipeline of chroma loads no adapter"):
        components_to_adapt(recipe, chroma.tiny())


def test_an_adapter_of_attention_alone_may_be_for_flux_too() -> None:
    attention = ["lora_unet_double_blocks_0_img_attn_qkv.alpha"]
    block = [*attention, "lora_unet_single_blocks_0_linear1.alpha"]
    assert chroma.recognises(attention) and flux.recognises(attention)
    assert chroma.recognises(block) and not flux.recognises(block)
    assert not chroma.recognises([*block, "lora_unet_single_blocks_0_modulation_lin.alpha"])
