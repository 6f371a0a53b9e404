"""What every registered family keeps, on its own tiny instance."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit import families
from lorakit.adapters import ADAPTERS, AdapterState, adapter_state, trainable_parameters
from lorakit.adapters.state import adaptable_layers, adapters_disabled
from lorakit.adapters.targets import PRESETS
from lorakit.core.errors import InputError
from lorakit.data.cache import fill_text, text_key
from lorakit.data.shards import Cache
from lorakit.export import DIALECTS, read_adapter
from lorakit.export.fused import fuse
from lorakit.export.verify import write_verified
from lorakit.training import execution
from lorakit.training.execution import checkpointed, compute_again

NAMES = families.FAMILIES.names()
CAPTIONS = ["a red circle", ""]


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> families.Family:
    module = families.FAMILIES.module(request.param)
    return module.load(module.Settings(path=str(module.tiny().path)))  # type: ignore[no-any-return]


def adapt(family: families.Family, *, targets: str | None = None) -> dict[str, torch.nn.Module]:
    """Puts a fresh adapter on `targets`, or the default ones, of all that may carry one."""
    parts = {name: family.components[name] for name in (family.backbone, *family.text_encoders)}
    for name, module in parts.items():
        settings = ADAPTERS.module("lora").Settings(rank=2)
        own = (targets,) if targets else family.default_targets[name]
        ADAPTERS.module("lora").inject(module, settings, targets=own, seed=0)
    return parts


def noisy(family: families.Family, count: int = 2) -> tuple[Tensor, Tensor]:
    side = 8 * family.side_multiple
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(count, *family.latent_shape(side, side), generator=generator)
    return x_t, family.process.at(torch.linspace(0.01, 1, count))


def test_pictures_become_latents_that_the_backbone_takes(family: families.Family) -> None:
    side = family.side_multiple
    latents = family.encode_images(torch.rand(2, 3, side * 4, side * 6) * 2 - 1)
    assert latents.shape == (2, *family.latent_shape(side * 6, side * 4))
    assert latents.shape[-1] * 4 == latents.shape[-2] * 6
    assert not latents.requires_grad
    text = family.encode_text(["a", "b"])
    t = family.process.at(torch.tensor([0.0, 1.0]))
    assert family.predict(latents, t, text).shape == latents.shape


def test_a_folder_says_which_family_it_is_of(family: families.Family, tmp_path: Path) -> None:
    assert families.named_at(str(family.path)) == family.name
    assert families.named_at(str(tmp_path)) == families.named_at("embedded") == families.DEFAULT
    with pytest.raises(InputError, match="does not exist"):
        families.named_at(str(tmp_path / "none"))


def test_everything_is_frozen_and_in_eval_mode(family: families.Family) -> None:
    for module in family.components.values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def recorded(backbone: torch.nn.Module, call: Any) -> dict[str, Any]:
    """The arguments of the last call that `call()` puts to `backbone`, by name, without those that say nothing."""
    made: list[dict[str, Any]] = []
    names = inspect.signature(backbone.forward)

    def listen(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given = names.bind(*args, **kwargs).arguments
        told = {name: x for name, x in given.items() if x is not None and not (isinstance(x, dict) and not x)}
        made.append({name: x for name, x in told.items() if name != "return_dict"})

    hook = backbone.register_forward_pre_hook(listen, with_kwargs=True)
    with torch.no_grad():
        call()
    hook.remove()
    return made[-1]


def assert_same(own: Any, stock: Any, name: str) -> None:
    if isinstance(stock, dict):
        assert own.keys() == stock.keys(), name
        for key in stock:
            assert_same(own[key], stock[key], f"{name}.{key}")
    elif stock is None:
        assert own is None, name
    else:
        if isinstance(stock, list) and isinstance(stock[0], Tensor):
            assert [len(tensor) for tensor in own] == [len(tensor) for tensor in stock], name
            own, stock = torch.cat(own), torch.cat(stock)
        own, stock = torch.as_tensor(own), torch.as_tensor(stock)
        # a time for all is the same as one for each
        torch.testing.assert_close(own.to(stock.dtype), stock.expand(own.shape), rtol=0, atol=1e-6, msg=name)


class Decoding(Exception):
    """What a stock pipeline has drawn, on its way into the VAE."""


def test_a_flow_is_asked_and_heard_as_by_the_stock_pipeline(
    family: families.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family.process.prediction_type != "flow":
        pytest.skip("no flow")
    pipeline = family.stock_pipeline()
    height, width = 4 * family.drawing_multiple, 6 * family.drawing_multiple
    answers: list[Tensor] = []

    def step(answer: Tensor, t: Tensor, x_t: Tensor, **_: Any) -> tuple[Tensor]:
        """Stays where it is, and at the end hands out what the backbone said as if it were latents."""
        answers.append(answer)
        return (answer if len(answers) == 2 else x_t,)

    def decode(z: Tensor, **_: Any) -> None:
        raise Decoding(z)

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    monkeypatch.setattr(pipeline.vae, "decode", decode)
    told = getattr(family, "guidance", None)  # what some models are told; as in training, none is led away from
    prompts = [CAPTIONS[0], "a"]  # an empty one may stand for what is led away from: below
    takes = inspect.signature(pipeline.__call__).parameters
    asked = {"use_resolution_binning": False} if "use_resolution_binning" in takes else {}  # draw what is asked for
    drawn: list[Tensor] = []

    def draw() -> None:
        with pytest.raises(Decoding) as caught:
            pipeline(
                prompt=list(prompts),
                height=height,
                width=width,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                guidance_scale=0.0 if told is None else told,
                **asked,
            )
        drawn.append(caught.value.args[0])

    stock = recorded(getattr(pipeline, family.backbone), draw)
    x_t = torch.randn(2, *family.latent_shape(width, height), generator=torch.Generator().manual_seed(0))
    said: list[Tensor] = []

    def predict() -> None:
        t = pipeline.scheduler.sigmas[1].expand(2)
        assert 0 < t[0] < 1
        said.append(family.predict(x_t, t, family.encode_text(prompts)))

    own = recorded(family.components[family.backbone], predict)
    assert own.keys() == stock.keys()
    for name in stock:
        assert_same(own[name], stock[name], name)
    # encoding is the inverse of what the pipeline does before it decodes
    posterior = SimpleNamespace(mean=drawn[0], mode=lambda: drawn[0])
    found = SimpleNamespace(latent_dist=posterior, latent=drawn[0])
    monkeypatch.setattr(family.components["vae"], "encode", lambda pixels: found)
    heard = family.encode_images(torch.zeros(2, 3, height, width))
    torch.testing.assert_close(said[0], heard, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", [False, True], ids=["uncropped", "cropped"])
def test_the_backbone_gets_what_the_stock_pipeline_hands_it(family: families.Family, told: bool) -> None:
    module: Any = families.FAMILIES.module(family.name)
    if "guidance" in module.Settings.model_fields:  # a number that the backbone is told
        family = module.load(module.Settings(path=str(family.path), guidance=5.0))
    pipeline = family.stock_pipeline()
    height, width = 4 * family.drawing_multiple, 6 * family.drawing_multiple
    sizes, asked = [50, 70, 3, 5, height, width], {}
    if told and "original_size" in inspect.signature(pipeline.__call__).parameters:
        asked = {"original_size": (50, 70), "crops_coords_top_left": (3, 5), "target_size": (height, width)}

    def draw() -> None:
        pipeline(
            prompt=CAPTIONS[0],
            height=height,
            width=width,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **asked,
        )

    stock = recorded(getattr(pipeline, family.backbone), draw)
    x_t = next(iter(stock.values()))
    listed = isinstance(x_t, list)
    if listed:  # of films of one picture
        x_t = torch.stack(x_t).squeeze(2)
    if x_t.ndim == 3:  # tokens
        shape = family.latent_shape(width, height)
        if x_t.shape[1] == shape[-1] * shape[-2]:  # one for each place
            x_t = x_t.mT
        else:
            x_t = pipeline._unpack_latents(x_t, height, width, pipeline.vae_scale_factor)
        x_t = x_t.reshape(len(x_t), *shape)  # of some, a film of one picture
    # the backbone's own clock is the family's affair
    flow = family.process.prediction_type == "flow"
    t = pipeline.scheduler.sigmas[1] if flow else torch.as_tensor(stock["timestep"])

    def predict() -> None:
        # what guidance leads away from, no negative prompt, is what a dropped caption is. It comes first in a batch of
        # both, second in a list, last in a call of its own, or not at all
        guided = getattr(pipeline, "do_classifier_free_guidance", False)
        captions = CAPTIONS[:: 1 if listed else -1] if len(x_t) == 2 else CAPTIONS[1:] if guided else CAPTIONS[:1]
        wanted = torch.tensor([sizes] * len(x_t)) if told else None
        family.predict(x_t, t.expand(len(x_t)), family.encode_text(captions), sizes=wanted)

    own = recorded(family.components[family.backbone], predict)
    assert own.keys() == stock.keys()
    for name in stock:
        assert_same(own[name], stock[name], name)


def test_a_caption_says_the_same_whatever_stands_beside_it(family: families.Family, tmp_path: Path) -> None:
    cache, captions = Cache(tmp_path), ["a", "a longer caption"]
    fill_text(cache, captions, encode=family.encode_text, fingerprint="x")
    alone, both = (cache.read_stacked([text_key(c, "x") for c in some]) for some in (captions[:1], captions))
    if "lengths" in alone:  # states of a caption's own tokens alone
        assert alone["states"].shape[1] == alone["lengths"].item() == both["lengths"][0] < both["states"].shape[1]
    side = 8 * family.side_multiple
    x_t, t = torch.randn(2, *family.latent_shape(side, side)), family.process.at(torch.tensor([0.3, 0.7]))
    with torch.no_grad():
        padded, plain = family.predict(x_t, t, both)[:1], family.predict(x_t[:1], t[:1], alone)
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_changes_no_bit(family: families.Family) -> None:
    x_t, t = noisy(family)
    with torch.no_grad():
        before = family.predict(x_t, t, family.encode_text(CAPTIONS))
        parts = adapt(family)
        assert torch.equal(family.predict(x_t, t, family.encode_text(CAPTIONS)), before)
        for name, parameter in trainable_parameters(parts).items():
            parameter.add_(0.1 if name.endswith("lora_B.weight") else 0.0)
        assert not torch.equal(family.predict(x_t, t, family.encode_text(CAPTIONS)), before)
        with adapters_disabled(parts):
            assert torch.equal(family.predict(x_t, t, family.encode_text(CAPTIONS)), before)


def test_training_moves_the_adapter_in_every_part_and_no_bit_of_the_base(family: families.Family) -> None:
    base = {
        f"{name}.{key}": tensor.clone()
        for name, module in family.components.items()
        for key, tensor in module.state_dict().items()
    }
    parts = adapt(family)
    started = {name: parameter.detach().clone() for name, parameter in trainable_parameters(parts).items()}
    optimizer = torch.optim.AdamW(trainable_parameters(parts).values(), lr=1e-2)
    x_t, t = noisy(family)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = family.predict(x_t, t, family.encode_text(["a dog", ""])).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], "at the same draws"
    after = {
        f"{name}.{key.replace('.base_layer', '')}": tensor
        for name, module in family.components.items()
        for key, tensor in module.state_dict().items()
        if ".lora_" not in key
    }
    assert base.keys() == after.keys()
    assert all(torch.equal(base[key], after[key]) for key in base)
    moved = {
        name.split(".")[0]
        for name, parameter in trainable_parameters(parts).items()
        if name.endswith("lora_B.weight") and not torch.equal(parameter, started[name])
    }
    assert moved == set(parts)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_names_its_kind_of_layers_which_train_and_are_exported(
    family: families.Family, preset: str, tmp_path: Path
) -> None:
    whole = {name: adaptable_layers(module) for name, module in family.components.items()}
    parts = adapt(family, targets=preset)
    parameters = trainable_parameters(parts)
    adapted = {name.rpartition(".lora_")[0] for name in parameters}
    for part in parts:
        of_part = {name.removeprefix(f"{part}.") for name in adapted if name.startswith(f"{part}.")}
        convolutions = {name for name, layer in whole[part].items() if isinstance(layer, torch.nn.Conv2d)}
        assert of_part, part
        if preset in ("all-linear", "all+conv"):
            depthwise = {name for name in convolutions if getattr(whole[part][name], "groups", 1) != 1}
            left_out = convolutions if preset == "all-linear" else depthwise
            assert of_part == whole[part].keys() - left_out
        else:
            of_attention = {name for name in of_part if re.search(r"attn|attention\.|Attention\.", name)}
            assert of_attention and (of_part == of_attention) == (preset == "attention")
    family.predict(*noisy(family), family.encode_text(["a dog", ""])).square().mean().backward()
    torch.optim.SGD(parameters.values(), lr=1.0).step()
    moved = {name.split(".")[0] for name, p in parameters.items() if name.endswith("lora_B.weight") and p.any()}
    assert moved == set(parts)
    if preset == "all+conv":  # the others' layers are among them
        state = adapter_state(parts)
        # alphas by patterns: diffusers misreads some that are not the same for all
        alphas = {layer: 1.0 + i % 3 for i, layer in enumerate(state.layers())}
        state = AdapterState(state.kind, state.tensors, alphas)
        for format in {family.default_format, "kohya" if family.lora_prefixes else "diffusers"}:
            report = write_verified(state, tmp_path / f"{format}.safetensors", family=family, format=format)
            assert report.modules == len(adapted)


def test_gradient_checkpointing_gives_the_same_gradients(family: families.Family) -> None:
    parts = adapt(family)
    x_t, t = noisy(family)
    gradients = []
    for module in parts.values():
        module.train()
    for share in (0, 0.5, 1):
        for module in parts.values():
            if share:
                compute_again(module, share=share)
            module.zero_grad()
        family.predict(x_t, t, family.encode_text(["a dog", "a cat"])).square().mean().backward()
        found = {name: p.grad.clone() for name, p in trainable_parameters(parts).items() if p.grad is not None}
        gradients.append(found)
    assert {name.split(".")[0] for name in gradients[0]} == set(parts)
    for others in gradients[1:]:
        assert gradients[0].keys() == others.keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_a_share_of_the_blocks_that_can_is_computed_again(
    family: families.Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone: Any = family.components[family.backbone].train()
    x_t, t = noisy(family)
    text = family.encode_text(["a dog", "a cat"])
    asked: set[Any] = set()
    again: set[Any] = set()

    def noting(blocks: set[Any]) -> Any:
        def call(block: Any, *args: Any, **options: Any) -> Any:
            blocks.add(getattr(block, "func", block))
            return block(*args)

        return call

    backbone.enable_gradient_checkpointing(noting(asked))
    family.predict(x_t, t, text)
    assert asked and asked <= set(checkpointed(backbone))
    monkeypatch.setattr(execution, "checkpoint", noting(again))
    compute_again(backbone, share=0.99)
    family.predict(x_t, t, text)
    assert again == asked
    again.clear()
    compute_again(backbone, share=0.5)
    family.predict(x_t, t, text)
    assert again < asked or len(asked) == 1


def test_cached_conditioning_is_what_the_encoder_gave(family: families.Family, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    fill_text(cache, CAPTIONS, encode=family.encode_text, fingerprint="x")
    stored = cache.read_stacked([text_key(caption, "x") for caption in CAPTIONS])
    with torch.no_grad():
        single = [family.encode_text([caption]) for caption in CAPTIONS]
    assert stored.keys() == single[0].keys()
    for name, tensor in stored.items():
        rows = [text[name][0] for text in single]
        expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
        assert torch.equal(tensor, expected), name


def test_in_half_precision_it_predicts_and_draws(family: families.Family) -> None:
    family.to("cpu", torch.bfloat16)
    x_t, t = noisy(family)
    assert family.predict(x_t, t, family.encode_text(CAPTIONS)).dtype == torch.bfloat16
    side = 2 * family.drawing_multiple
    drawn = family.live_pipeline()(prompt="a", num_inference_steps=2, width=side, height=side, output_type="pt").images
    assert drawn.isfinite().all()
    assert family.encode_images(torch.zeros(1, 3, side, side)).dtype == torch.float32


@pytest.mark.parametrize("format", ["default", "diffusers"])
def test_a_trained_adapter_is_written_and_read_back(family: families.Family, tmp_path: Path, format: str) -> None:
    parts = adapt(family)
    with torch.no_grad():
        for name, parameter in trainable_parameters(parts).items():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    state = adapter_state(parts)
    assert set(state.components()) == set(parts)
    assert set(family.lora_prefixes) in (set(), set(parts))
    format = family.default_format if format == "default" else format
    report = write_verified(state, tmp_path / "a.safetensors", family=family, format=format)
    assert report.modules == len(state.layers())


def test_a_file_for_comfyui_is_read(family: families.Family, tmp_path: Path) -> None:
    parts = {family.backbone: adapt(family)[family.backbone]}
    for name, parameter in trainable_parameters(parts).items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    state = adapter_state(parts)
    tensors: dict[str, Tensor] = {}
    for name, alpha in (whole := fuse(state, family)).alphas.items():
        component, _, path = name.partition(".")
        base = f"diffusion_model.{path if name in family.fused else family.original_name(component, path)}"
        tensors |= {f"{base}.{end}": whole.tensors[f"{name}.{end}"] for end in ("lora_A.weight", "lora_B.weight")}
        tensors[f"{base}.alpha"] = torch.tensor(alpha)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors", family=family)
    assert read.alphas == state.alphas and read.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in state.tensors.items())


def test_a_format_without_names_for_its_layers_is_refused(family: families.Family, tmp_path: Path) -> None:
    if family.lora_prefixes:
        return
    state, base = adapter_state(adapt(family)), "lora_unet_x"
    with pytest.raises(InputError, match="kohya is not for this model"):
        write_verified(state, tmp_path / "a.safetensors", family=family, format="kohya")
    tensors = {f"{base}.lora_down.weight": torch.ones(1, 2), f"{base}.lora_up.weight": torch.ones(2, 1)}
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: the format kohya is not for this model"):
        read_adapter(tmp_path / "b.safetensors", family=family)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_long_captions_are_cut_at_the_limit(family: families.Family) -> None:
    description = families.describe(family.name, str(family.path))
    assert description.token_limit == family.token_limit
    assert description.count_tokens("abc " * 200) > description.token_limit
    # a word more than there is room for, and for what a caption is wrapped in: it says nothing, and the last one does
    room = next(n for n in range(1, 600) if description.count_tokens("b " * n) > description.token_limit)
    full, more = "b " * (room - 1), "b " * (room + description.count_tokens(""))
    text, other = (family.encode_text([caption]) for caption in (full, full[:-2] + "c "))
    assert not all(torch.equal(text[name], other[name]) for name in text)
    text, same = (family.encode_text([more + last]) for last in ("b", "c"))
    assert all(torch.equal(text[name], same[name]) for name in text)


def test_a_description_agrees_with_the_loaded_model(family: families.Family) -> None:
    description = families.describe(family.name, str(family.path))
    assert description.side_multiple == family.side_multiple
    assert description.drawing_multiple == family.drawing_multiple
    assert description.resolution % description.side_multiple == 0
    assert description.default_targets == family.default_targets
    side = 4 * family.side_multiple
    assert description.latent_size(side, 2 * side) == torch.zeros(family.latent_shape(side, 2 * side)).numel()
    assert description.text_size == sum(tensor.numel() for tensor in family.encode_text(["abc " * 200]).values())


def test_only_its_own_adapters_are_recognised(family: families.Family) -> None:
    state = adapter_state(adapt(family))
    for format in ("diffusers", "kohya") if family.lora_prefixes else ("diffusers",):
        assert families.recognised(DIALECTS.module(format).write(state, family, {})[0]) == [family.name]
    assert families.recognised({}) == families.recognised({"nothing.lora_A.weight": torch.ones(1)}) == []


def test_what_is_read_later_is_the_same_to_the_bit(family: families.Family) -> None:
    later = families.load_settings(family.source.settings, later=("vae", "text_encoder"))
    side = 8 * family.side_multiple
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def encoded(family: families.Family) -> list[Tensor]:
        with torch.no_grad():
            return [family.encode_images(pixels), *family.encode_text(["a red circle"]).values()]

    def away() -> list[str]:
        return [name for name, part in later.components.items() if all(p.is_meta for p in part.parameters())]

    others = [name for name in later.components if name != family.backbone]
    assert others and sorted(away()) == sorted(others)
    for _ in range(2):
        with later.at_hand(["vae"]):
            assert sorted(away()) == sorted(set(others) - {"vae"})
            with later.at_hand():
                assert not away() and all(map(torch.equal, encoded(later), encoded(family)))
                assert not any(
                    p.requires_grad or part.training for part in later.components.values() for p in part.parameters()
                )
        assert sorted(away()) == sorted(others)


def test_names_come_from_a_stock_pipeline_as_from_the_family(family: families.Family) -> None:
    pipeline = family.stock_pipeline()
    names = families.around(pipeline)
    assert names.name == family.name
    assert (names.backbone, names.text_encoders) == (family.backbone, family.text_encoders)
    assert names.lora_prefixes == family.lora_prefixes
    assert names.fused == family.fused
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
