"""lorakit/export/fused.py: an adapter of a fused layer and those of its parts change the weights alike."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import AdapterState
from lorakit.adapters.state import with_alphas
from lorakit.core.errors import InputError
from lorakit.export import DIALECTS
from lorakit.export.fused import fuse, fused_alphas, split, whole_layers

OUT = {"to_q": 6, "to_k": 4, "to_v": 5, "mlp": 8}  # none as high as another
PARTS = tuple(f"net.block.{name}" for name in OUT)
WHOLE = "net.blocks.0.linear1"


def family() -> Any:
    layers = {name: nn.Linear(7, height) for name, height in OUT.items()}
    net = nn.ModuleDict({"block": nn.ModuleDict({"mlp": layers.pop("mlp"), **layers}), "other": nn.Linear(7, 3)})
    return SimpleNamespace(
        name="fused",
        components={"net": net},
        backbone="net",
        text_encoders=(),
        lora_prefixes={"net": "lora_unet_"},
        fused={WHOLE: PARTS},
        original_name=lambda component, path: path,
    )


def adapter(ranks: dict[str, int], *, alphas: dict[str, float] | None = None, zero: str = "") -> AdapterState:
    """An adapter of the named parts, and of the layer that is nobody's part."""
    tensors: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)
    for name, rank in {**ranks, "other": 2}.items():
        layer = f"net.{name}" if name == "other" else f"net.block.{name}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 7, generator=draw)
        height = {**OUT, "other": 3}[name]
        tensors[f"{layer}.lora_B.weight"] = torch.randn(height, rank, generator=draw) * (name != zero)
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    return AdapterState("lora", tensors, {n: (alphas or {}).get(n.rpartition(".")[2], 0.1) for n in layers})


def change(state: AdapterState, layer: str, height: int) -> Tensor:
    """alpha/rank · B A, zero for a layer without an adapter."""
    if layer not in state.alphas:
        return torch.zeros(height, 7, dtype=torch.float64)
    first, second = (state.tensors[f"{layer}.lora_{letter}.weight"].double() for letter in "AB")
    return state.alphas[layer] / len(first) * second @ first


def changes(state: AdapterState) -> dict[str, Tensor]:
    return {name: change(state, f"net.block.{name}", height) for name, height in OUT.items()}


CASES = {
    "all alike": adapter(dict.fromkeys(OUT, 3)),
    "other ranks": adapter({"to_q": 3, "to_k": 1, "to_v": 2, "mlp": 4}),
    "two missing": adapter({"to_k": 3, "mlp": 3}),
    "other strengths": adapter(dict.fromkeys(OUT, 2), alphas={"to_q": 4.0, "to_k": 0.3, "to_v": 1.0, "mlp": 7.0}),
    "one alone": adapter({"to_v": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_changes_the_weights_as_its_parts_do(case: str) -> None:
    state = CASES[case]
    whole = fuse(state, family())
    assert whole.layers() == [WHOLE, "net.other"]
    wanted = torch.cat(list(changes(state).values()))
    torch.testing.assert_close(change(whole, WHOLE, sum(OUT.values())), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(whole.tensors["net.other.lora_B.weight"], state.tensors["net.other.lora_B.weight"])


@pytest.mark.parametrize("case", CASES)
def test_and_back_they_are_the_parts_that_were_there(case: str) -> None:
    state, model = CASES[case], family()
    back = split(fuse(state, model), model)
    assert back.layers() == state.layers()
    for name, tensor in state.tensors.items():
        assert back.tensors[name].shape == tensor.shape
        if not case.startswith("other"):
            assert torch.equal(back.tensors[name], tensor)
            assert back.alphas == pytest.approx(state.alphas, rel=1e-7)
    for name, wanted in changes(state).items():
        torch.testing.assert_close(changes(back)[name], wanted, rtol=1e-6, atol=1e-7)


def test_where_all_are_alike_alpha_is_a_sum_and_comes_back_to_the_bit() -> None:
    alpha = float(torch.tensor(0.1))
    state = adapter(dict.fromkeys(OUT, 3), alphas=dict.fromkeys((*OUT, "other"), alpha))
    assert fuse(state, family()).alphas[WHOLE] == pytest.approx(4 * alpha)
    assert split(fuse(state, family()), family()).alphas == state.alphas


def test_a_whole_that_was_trained_as_one_gives_every_part_its_rows_and_the_shared_a() -> None:
    draw = torch.Generator().manual_seed(1)
    first, second = torch.randn(4, 7, generator=draw), torch.randn(sum(OUT.values()), 4, generator=draw)
    whole = AdapterState("lora", {f"{WHOLE}.lora_A.weight": first, f"{WHOLE}.lora_B.weight": second}, {WHOLE: 2.0})
    parts = split(whole, family())
    assert parts.layers() == sorted(PARTS)
    assert all(torch.equal(parts.tensors[f"{part}.lora_A.weight"], first) for part in PARTS)
    stacked = torch.cat([parts.tensors[f"{part}.lora_B.weight"] for part in PARTS])
    assert torch.equal(stacked, second) and set(parts.alphas.values()) == {2.0}


def test_a_part_without_a_change_is_left_out_unless_nothing_changes() -> None:
    some = split(fuse(adapter(dict.fromkeys(OUT, 2), zero="to_k"), family()), family())
    assert set(PARTS) - {*some.layers()} == {"net.block.to_k"}
    nothing = AdapterState(
        "lora",
        {f"{WHOLE}.lora_A.weight": torch.ones(2, 7), f"{WHOLE}.lora_B.weight": torch.zeros(sum(OUT.values()), 2)},
        {WHOLE: 1.0},
    )
    assert split(nothing, family()).layers() == sorted(PARTS)


def test_a_part_may_not_be_there_besides() -> None:
    state = adapter({"to_q": 2})
    both = fuse(state, family())
    both = AdapterState("lora", {**state.tensors, **both.tensors}, {**state.alphas, **both.alphas})
    with pytest.raises(InputError, match="to_q is adapted twice"):
        split(both, family())


def test_kohyas_layout_has_the_whole_and_is_read_back_as_parts() -> None:
    kohya, model, state = DIALECTS.module("kohya"), family(), CASES["all alike"]
    tensors, metadata = kohya.write(state, model, {})
    assert {key.partition(".")[0] for key in tensors} == {"lora_unet_blocks_0_linear1", "lora_unet_other"}
    assert tensors["lora_unet_blocks_0_linear1.lora_up.weight"].shape == (sum(OUT.values()), 12)
    back = kohya.read(tensors, metadata, model)
    assert back.layers() == state.layers()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in state.tensors.items())
    # other programs write the parts under diffusers' names, behind either prefix
    for prefix in ("lora_unet_", "lora_net_"):
        apart = {
            f"{prefix}block_to_q.lora_down.weight": torch.ones(2, 7),
            f"{prefix}block_to_q.lora_up.weight": torch.ones(6, 2),
            f"{prefix}block_to_q.alpha": torch.tensor(1.0),
        }
        assert kohya.read(apart, {}, model).layers() == ["net.block.to_q"]


def test_wholes_have_the_shapes_of_their_parts_together() -> None:
    assert {name: tuple(layer.weight.shape) for name, layer in whole_layers(family()).items()} == {WHOLE: (23, 7)}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_one_strength_keep_their_rows(case: str) -> None:
    state = CASES[case]
    even = with_alphas(state, {**state.alphas, **fused_alphas(state, family())})
    for name, wanted in changes(state).items():
        torch.testing.assert_close(changes(even)[name], wanted, rtol=1e-6, atol=1e-6)
    back = split(fuse(even, family()), family())
    for layer, alpha in back.alphas.items():
        assert alpha == pytest.approx(even.alphas[layer], rel=1e-6)
        assert torch.equal(back.tensors[f"{layer}.lora_B.weight"], even.tensors[f"{layer}.lora_B.weight"])
    assert fused_alphas(even, family()) == {}
    if case == "all alike":
        assert even.alphas == state.alphas
