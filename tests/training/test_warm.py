"""A warm start from any dialect gives the file's own weights; what does not fit says what and how."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters import AdapterState, adapter_state, lora, trainable_parameters
from lorakit.adapters.targets import PatternSettings
from lorakit.core.errors import InputError
from lorakit.core.seeding import generator
from lorakit.export.files import write_adapter
from lorakit.families import sd
from lorakit.training.warm import warm_start

UNET, TEXT = ("to_q", "to_v", "ff.net.2"), ("q_proj",)


def adapted(
    parts: Sequence[str] = ("unet", "text_encoder"),
    *,
    rank: int = 2,
    alpha: float | None = None,
    rslora: bool = False,
    targets: Sequence[str] = UNET,
    patterns: Sequence[PatternSettings] = (),
) -> tuple[sd.StableDiffusion, dict[str, nn.Module]]:
    """A tiny model of its own with fresh adapters."""
    family = sd.load(sd.Settings(path=str(sd.tiny().path)))
    modules: dict[str, nn.Module] = {name: family.components[name] for name in parts}
    settings = lora.Settings(rank=rank, alpha=alpha, rslora=rslora, patterns=list(patterns))
    for name, module in modules.items():
        lora.inject(module, settings, targets=targets if name == "unet" else TEXT, seed=0)
    return family, modules


def trained(modules: dict[str, nn.Module]) -> AdapterState:
    """The state of `modules` after what might have been a training, in numbers that half precision holds."""
    for name, parameter in trainable_parameters(modules).items():
        random = torch.randn(parameter.shape, generator=generator("warm", name))
        parameter.data.copy_(random.half().float() * (random.abs() < 2))
    return adapter_state(modules)


def written(path: Path, format: str, state: AdapterState, family: sd.StableDiffusion, **options: object) -> Path:
    write_adapter(state, path, format=format, family=family, **options)
    return path


def prediction(family: sd.StableDiffusion) -> Tensor:
    family.unet.eval()
    with torch.no_grad():
        text = family.encode_text(["a thing"])
        return family.predict(torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.tensor([500]), text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", ["lorakit", "kohya", "diffusers", "peft"])
def test_the_weights_are_the_files_whatever_its_dialect(format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, modules = adapted()
    fresh = prediction(family)
    state = trained(modules)
    file = written(tmp_path / ("f" if format == "peft" else "f.safetensors"), format, state, family, dtype=dtype)
    other, into = adapted()
    assert torch.equal(prediction(other), fresh), "a fresh adapter changes nothing"
    warm_start(into, file, family=other)
    again = adapter_state(into)
    assert again.alphas == state.alphas
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trainable_parameters(into).values())
    assert torch.equal(prediction(other), prediction(family)) and not torch.equal(prediction(other), fresh)


def test_a_scale_by_the_root_of_the_rank_is_kept(tmp_path: Path) -> None:
    family, modules = adapted(rslora=True)
    file = written(tmp_path / "f.safetensors", "kohya", trained(modules), family)
    other, into = adapted(rslora=True)
    warm_start(into, file, family=other)
    assert torch.equal(prediction(other), prediction(family))
    with pytest.raises(InputError, match=rf"adapter.alpha is 2 and the file's {2 * math.sqrt(2):g} .*rslora"):
        warm_start(adapted()[1], file, family=other)


def test_a_file_without_alphas_has_its_rank_for_alpha_or_is_refused(tmp_path: Path) -> None:
    family, modules = adapted(["unet"])
    file = written(tmp_path / "f.safetensors", "kohya", trained(modules), family)
    save_file({name: tensor for name, tensor in load_file(file).items() if tensor.ndim}, file)
    other, into = adapted(["unet"])
    warm_start(into, file, family=other)
    assert torch.equal(prediction(other), prediction(family))
    with pytest.raises(InputError, match="alpha"):
        warm_start(adapted(["unet"], alpha=1.0)[1], file, family=family)


BOTH = ("unet", "text_encoder")
DIFFERENCES = [
    # what the file was trained with, what the recipe asks for, what the message must hold
    ({"rank": 4}, {"rank": 2}, ["adapter.rank is 2 and the file's 4", "adapter.text_encoder.rank is 2"]),
    ({"alpha": 1.0}, {"alpha": 3.0}, ["adapter.alpha is 3 and the file's 1"]),
    ({"parts": ["unet"]}, {"parts": BOTH}, ["no weights for text_encoder", "leave adapter.text_encoder out"]),
    ({"parts": BOTH}, {"parts": ["unet"]}, ["weights for text_encoder, which the recipe does not", "adapter.text_enc"]),
    ({"targets": ["to_q"]}, {"targets": UNET}, ["lacks 12 layers that adapter.targets names, like unet."]),
    ({"targets": UNET}, {"targets": ["to_q"]}, ["has 12 layers that adapter.targets does not name, like unet."]),
]


@pytest.mark.parametrize(("of_file", "of_recipe", "said"), DIFFERENCES)
def test_a_difference_is_named_once_and_nothing_changes(
    of_file: dict, of_recipe: dict, said: list[str], tmp_path: Path
) -> None:
    family, modules = adapted(**of_file)
    file = written(tmp_path / "theirs.safetensors", "kohya", trained(modules), family)
    other, into = adapted(**of_recipe)
    before = adapter_state(into)
    with pytest.raises(InputError) as caught:
        warm_start(into, file, family=other)
    assert len(caught.value.problems) <= 4, "a line for each difference, not for each layer"
    for problem in caught.value.problems:
        assert problem.startswith("adapter.init_from") and "theirs.safetensors" in problem
    for words in said:
        assert words in str(caught.value)
    assert all(torch.equal(adapter_state(into).tensors[name], tensor) for name, tensor in before.tensors.items())


def test_layers_of_several_ranks_are_told(tmp_path: Path) -> None:
    (family, small), (_, large) = adapted(["unet"], targets=["to_q"]), adapted(["unet"], rank=4, targets=["to_v"])
    one, two = trained(small), trained(large)
    mixed = AdapterState("lora", one.tensors | two.tensors, one.alphas | two.alphas)
    file = written(tmp_path / "f.safetensors", "kohya", mixed, family)
    with pytest.raises(InputError, match=r"adapter.rank is one number .* several \(2, 4\)"):
        warm_start(adapted(["unet"], targets=["to_q", "to_v"])[1], file, family=family)


def broken(tmp_path: Path, fault: str) -> Path:
    family, modules = adapted(["unet"], targets=["to_q"])
    state = trained(modules)
    path = tmp_path / "f.safetensors"
    if fault == "another base":
        wider = {n: torch.zeros(t.shape[0], t.shape[1] + 8) if "_A" in n else t for n, t in state.tensors.items()}
        state = AdapterState("lora", wider, state.alphas)
    if fault in ("cut off", "another base", "not finite"):
        written(path, "kohya", state, family)
    if fault == "not finite":
        tensors = load_file(path)
        next(tensor for tensor in tensors.values() if tensor.ndim)[0, 0] = math.nan
        save_file(tensors, path)
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-7])
    if fault == "a pickle":
        path = tmp_path / "f.ckpt"
        path.write_bytes(b"\x80")
    return path


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "there is no such adapter file"),
        ("cut off", "damaged or cut off"),
        ("a pickle", "is a pickle"),
        ("another base", "the model asks for"),
        ("not finite", "not finite"),
    ],
)
def test_a_file_that_is_no_good_is_told(fault: str, said: str, tmp_path: Path) -> None:
    family, into = adapted(["unet"], targets=["to_q"])
    with pytest.raises(InputError) as caught:
        warm_start(into, broken(tmp_path, fault), family=family)
    assert said in str(caught.value)
    assert all(problem.startswith("adapter.init_from") for problem in caught.value.problems)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_layers_with_alphas_of_their_own_begin_where_they_were(tmp_path: Path, format: str) -> None:
    patterns = [PatternSettings(match="attn2", rank=3, alpha=5.0), PatternSettings(match="mid_block", alpha=0.3)]
    family, modules = adapted(["unet"], patterns=patterns)
    file = written(tmp_path / "f.safetensors", format, trained(modules), family)
    other, into = adapted(["unet"], patterns=patterns)
    warm_start(into, file, family=other)
    torch.testing.assert_close(prediction(other), prediction(family), rtol=0, atol=1e-5)
    other, into = adapted(["unet"], patterns=[*patterns[1:], PatternSettings(match="attn1", rank=3)])
    with pytest.raises(InputError, match="adapter.rank and its patterns give other numbers"):
        warm_start(into, file, family=other)
