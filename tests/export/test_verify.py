"""lorakit/export/verify.py: a file that gives back what was trained stays; every planted fault is seen, and goes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakit.adapters import AdapterState, adapter_state, lora, trainable_parameters
from lorakit.core.errors import VerificationError
from lorakit.core.files import sha256_file
from lorakit.export import DIALECTS, write_verified
from lorakit.export.probe import record_calls, stock_components
from lorakit.families import FAMILIES, folders
from tests.export.tiny import base, calls, equal, family, made, predictions


@pytest.mark.parametrize(
    ("format", "alpha", "rslora"),
    [
        ("kohya", 1.0, False),
        ("kohya", 16.0, False),
        ("kohya", 3.0, True),
        ("diffusers", 1.0, False),
        ("diffusers", 3.0, True),
    ],
)
def test_the_stock_loader_gives_the_very_bits(tmp_path, format: str, alpha: float, rslora: bool) -> None:
    state = made(rank=4, alpha=alpha, rslora=rslora)
    path = tmp_path / "a.safetensors"
    report = write_verified(state, path, family=family(), format=format)
    assert (report.max_difference, report.reader) == (0.0, "stock pipeline")
    assert report.modules == len(state.layers())
    assert report.keys == (3 if format == "kohya" else 2) * report.modules
    assert report.sha256 == sha256_file(path)
    # not by our own word: loaded here once more, against a model that lorakit injected
    pipeline = family().stock_pipeline()
    pipeline.load_lora_weights(path)
    got = calls().answer(stock_components(pipeline, family()))
    assert equal(got, predictions((state, 1.0)))
    assert not any(torch.equal(got[name][0], base()[name][0]) for name in ("unet", "text_encoder"))


@pytest.mark.parametrize("name", FAMILIES.names())
def test_parts_without_an_adapter_are_not_read(name: str, tmp_path, monkeypatch) -> None:
    model, read = FAMILIES.module(name).tiny(), []
    layer = next(key for key, part in model.components[model.backbone].named_modules() if key.endswith("to_q"))
    rows, columns = model.components[model.backbone].get_submodule(layer).weight.shape
    key = f"{model.backbone}.{layer}"
    pair = {f"{key}.lora_A.weight": torch.ones(2, columns), f"{key}.lora_B.weight": torch.ones(rows, 2)}
    state = AdapterState("lora", pair, {key: 2.0})
    honest = folders.load_pipeline
    monkeypatch.setattr(
        folders, "load_pipeline", lambda *args, **options: read.append(honest(*args, **options)) or read[-1]
    )
    write_verified(state, tmp_path / "a.safetensors", family=model)
    for pipeline in read:
        parts = {key for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        assert parts == {model.backbone}
    assert len(read) == 2


@pytest.mark.parametrize(("format", "reader"), [("peft", "peft"), ("lorakit", "lorakit")])
def test_other_formats_are_read_by_their_own_readers(tmp_path, format: str, reader: str) -> None:
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    report = write_verified(made(alpha=3.0), path, family=family(), format=format)
    assert (report.max_difference, report.reader) == (0.0, reader)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(tmp_path, dtype: torch.dtype) -> None:
    report = write_verified(made(), tmp_path / "a.safetensors", family=family(), dtype=dtype)
    assert 0 < report.max_difference < 5e-3


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def only(keep: Callable[[str], bool]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if keep(key)}


def noisy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    return {**tensors, key: tensors[key] * 1.5}


def exchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    (a, b, *_) = [k for k in tensors if k.endswith("to_q.lora_up.weight") and "up_blocks" in k]
    return {**tensors, a: tensors[b], b: tensors[a]}


FAULTS = {
    "lost alpha": only(lambda key: not key.endswith(".alpha")),
    "swapped prefix": rename("lora_te_", "lora_te2_"),
    "lost text_model": rename("_text_model_encoder_layers_0_", "_encoder_layers_9_"),
    "dropped text encoder": only(lambda key: not key.startswith("lora_te_")),
    "half file": lambda tensors: dict(sorted(tensors.items())[: 3 * (len(tensors) // 6)]),
    "half pair": lambda tensors: dict(sorted(tensors.items())[:-1]),
    "a layer off": noisy,
    "two layers exchanged": exchanged,
    "a stray key": lambda tensors: {**tensors, "lora_unet_x.lora_down.weight": torch.ones(2, 2)},
}


def planted(monkeypatch, format: str, fault: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    dialect = DIALECTS.module(format)
    honest = dialect.write

    def write(state: AdapterState, *rest: object) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, entries = honest(state, *rest)
        return fault(tensors), entries

    monkeypatch.setattr(dialect, "write", write)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_and_the_file_goes(tmp_path, monkeypatch, fault: str) -> None:
    planted(monkeypatch, "kohya", FAULTS[fault])
    state = made(alpha=2.0)  # fp16 is the hard case: it is allowed to cost something
    with pytest.raises(VerificationError):
        write_verified(state, tmp_path / "a.safetensors", family=family(), format="kohya", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


# diffusers takes no text encoder's keys without an out_proj among them
TARGETS = {"unet": ("to_q",), **dict.fromkeys(("text_encoder", "text_encoder_2"), ("q_proj", "out_proj"))}


def test_text_encoders_that_are_exchanged_are_seen(tmp_path, monkeypatch) -> None:
    model = FAMILIES.module("sdxl").tiny()
    components = stock_components(model.stock_pipeline(), model)
    for part, module in components.items():
        lora.inject(module, lora.Settings(rank=2), targets=TARGETS[part], seed=0)
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(components).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    state = adapter_state(components)
    write_verified(state, tmp_path / "a.safetensors", family=model)
    dialect = DIALECTS.module("kohya")
    honest = dialect.write

    def write(state: AdapterState, *rest: object) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, entries = honest(state, *rest)
        other = {"lora_te1_": "lora_te2_", "lora_te2_": "lora_te1_"}
        swapped = {other.get(key[:9], key[:9]) + key[9:]: tensor for key, tensor in tensors.items()}
        # cut or filled up to the other's size, so that every shape is right
        return {key: _fitted(tensor, tensors[key].shape) for key, tensor in swapped.items()}, entries

    monkeypatch.setattr(dialect, "write", write)
    with pytest.raises(VerificationError, match="otherwise than the training did"):
        write_verified(state, tmp_path / "b.safetensors", family=model)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def _fitted(tensor: Tensor, shape: torch.Size) -> Tensor:
    fitted = torch.zeros(shape)
    part = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape, strict=True))
    fitted[part] = tensor[part]
    return fitted


def test_transposed_matrices_are_seen(tmp_path, monkeypatch) -> None:
    # of a square layer with rank = width, where every shape stays right
    state = made(rank=16, targets=("mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.time_emb_proj"), text=False)
    square = {**state.tensors}
    turned = [key for key, tensor in square.items() if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]]
    assert turned
    kohya = DIALECTS.module("kohya").keymap(family())
    names = {kohya.to_foreign(key) for key in turned}
    planted(monkeypatch, "kohya", lambda tensors: {k: t.T if k in names else t for k, t in tensors.items()})
    with pytest.raises(VerificationError, match="otherwise than the training did"):
        write_verified(state, tmp_path / "a.safetensors", family=family(), format="kohya")


def test_a_weak_adapter_does_not_hide_a_fault_in_the_tolerance(tmp_path, monkeypatch) -> None:
    weak = made(alpha=2.0, size=3e-4)
    write_verified(weak, tmp_path / "a.safetensors", family=family(), dtype=torch.float16)
    planted(monkeypatch, "kohya", FAULTS["lost alpha"])
    with pytest.raises(VerificationError, match="the adapter's own effect is"):
        write_verified(weak, tmp_path / "b.safetensors", family=family(), dtype=torch.float16)


def test_an_adapter_that_half_precision_would_lose_is_not_written_in_it(tmp_path) -> None:
    tiny_b = made(alpha=4096.0, size=2e-8)
    write_verified(tiny_b, tmp_path / "a.safetensors", family=family())
    with pytest.raises(VerificationError, match="loses too much in fp16"):
        write_verified(tiny_b, tmp_path / "b.safetensors", family=family(), dtype=torch.float16)


def test_lost_metadata_of_the_diffusers_format_is_seen(tmp_path, monkeypatch) -> None:
    dialect = DIALECTS.module("diffusers")
    honest = dialect.write
    monkeypatch.setattr(dialect, "write", lambda *args: (honest(*args)[0], {}))
    with pytest.raises(VerificationError):
        write_verified(made(alpha=2.0), tmp_path / "a.safetensors", family=family(), format="diffusers")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_component_of_a_peft_folder_is_seen(tmp_path, monkeypatch) -> None:
    dialect = DIALECTS.module("peft")
    honest = dialect.write

    def write(state: AdapterState, *rest: object) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, entries = honest(state, *rest)
        kept = {key: value for key, value in entries.items() if not key.startswith("text_encoder/")}
        return {k: t for k, t in tensors.items() if not k.startswith("text_encoder/")}, kept

    monkeypatch.setattr(dialect, "write", write)
    with pytest.raises(VerificationError, match="adapted layers instead of"):
        write_verified(made(), tmp_path / "a", family=family(), format="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_adapter_changes_nothing_and_that_is_right(tmp_path) -> None:
    report = write_verified(made(size=0.0), tmp_path / "a.safetensors", family=family())
    assert report.max_difference == 0.0


def test_recording_leaves_the_model_and_the_generators_alone() -> None:
    model = family()
    dropout = next(m for m in model.components["unet"].modules() if isinstance(m, torch.nn.Dropout))
    dropout.p = 0.5
    model.components["unet"].train()  # as at the end of a training
    try:
        state = torch.get_rng_state()
        first, second = record_calls(model), record_calls(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.components["unet"].training
    finally:
        dropout.p = 0.0
        model.components["unet"].eval()
    assert not any(module._forward_pre_hooks for module in model.components.values())
    assert [len(made) for made in first.made.values()] == [1, 1]
    components = stock_components(model.stock_pipeline(), model)
    assert equal(first.answer(components), second.answer(components))
