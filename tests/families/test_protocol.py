"""What every registered family keeps, on its own tiny instance."""

import pytest
import torch

from lorakit import families
from lorakit.adapters import ADAPTERS, adapter_state
from lorakit.core.errors import InputError

NAMES = families.FAMILIES.names()


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> families.Family:
    module = families.FAMILIES.module(request.param)
    return module.load(module.Settings(path=str(module.tiny().path)))  # type: ignore[no-any-return]


def test_pictures_become_latents_that_the_backbone_takes(family: families.Family) -> None:
    side = family.side_multiple
    latents = family.encode_images(torch.rand(2, 3, side * 4, side * 6) * 2 - 1)
    assert latents.shape[0] == 2 and latents.shape[-2:] == (4, 6)
    assert not latents.requires_grad
    text = family.encode_text(["a", "b"])
    t = torch.tensor([0, family.process.timesteps - 1])
    assert family.predict(latents, t, text).shape == latents.shape


def test_everything_is_frozen_and_in_eval_mode(family: families.Family) -> None:
    for module in family.components.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_stock_pipeline_gives_the_same_conditioning_and_the_same_prediction(family: families.Family) -> None:
    pipeline = family.stock_pipeline()
    own = family.encode_text(["a red circle", ""])["states"]
    stock, negative = pipeline.encode_prompt("a red circle", "cpu", 1, True, negative_prompt="")
    assert torch.equal(own[:1], stock) and torch.equal(own[1:], negative)
    latents = torch.randn(1, own.shape[0] and family.encode_images(torch.zeros(1, 3, 32, 32)).shape[1], 8, 8)
    t = torch.tensor([7])
    backbone = getattr(pipeline, family.backbone)
    assert torch.equal(
        family.predict(latents, t, {"states": own[:1]}), backbone(latents, 7, encoder_hidden_states=stock).sample
    )


def test_default_targets_are_there_in_every_component(family: families.Family) -> None:
    inject = ADAPTERS.module("lora").inject
    settings = ADAPTERS.module("lora").Settings(rank=2)
    names = [family.backbone, *family.text_encoders]
    for name in names:
        inject(family.components[name], settings, targets=family.default_targets[name], seed=0)
    state = adapter_state({name: family.components[name] for name in names})
    assert set(state.components()) == set(names)
    assert set(family.lora_prefixes) == set(names)


def test_long_captions_are_cut_at_the_limit(family: families.Family) -> None:
    description = families.describe(family.name, str(family.path))
    assert description.token_limit == family.token_limit
    assert description.count_tokens("abc " * 100) > description.token_limit
    states = family.encode_text(["abc " * 100])["states"]
    assert states.shape[1] == family.token_limit


def test_a_description_agrees_with_the_loaded_model(family: families.Family) -> None:
    description = families.describe(family.name, str(family.path))
    assert description.side_multiple == family.side_multiple
    assert description.resolution % description.side_multiple == 0


def test_names_come_from_a_stock_pipeline_as_from_the_family(family: families.Family) -> None:
    pipeline = family.stock_pipeline()
    names = families.around(pipeline)
    assert names.name == family.name
    assert (names.backbone, names.text_encoders) == (family.backbone, family.text_encoders)
    assert names.lora_prefixes == family.lora_prefixes
    for part in (names.backbone, *names.text_encoders):
        assert names.components[part] is getattr(pipeline, part)
        for path, _ in family.components[part].named_modules():
            assert names.original_name(part, path) == family.original_name(part, path)


def test_each_task_has_its_pipeline_around_the_same_modules(family: families.Family) -> None:
    for task, kind in family.pipelines.items():
        pipeline = family.live_pipeline(task)
        assert type(pipeline).__name__ == kind
        assert all(getattr(pipeline, name) is part for name, part in family.components.items())


def test_what_is_no_known_pipeline_is_refused() -> None:
    with pytest.raises(InputError, match="Linear is no stock pipeline"):
        families.around(torch.nn.Linear(1, 1))
