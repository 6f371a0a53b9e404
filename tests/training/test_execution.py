"""How the backbone is executed: what is said is done, and what cannot be is refused by its key."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core.errors import InputError
from lorakit.families import FAMILIES
from lorakit.training import execution
from lorakit.training.execution import attention, compile_blocks, explained, use_channels_last


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.gelu(self.layer(x))


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def attended(kind: execution.Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives within the kernel, and its gradient."""
    q, k, v = (torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    with attention(kind):
        out = F.scaled_dot_product_attention(q, k, v)
        out.sum().backward()
    assert q.grad is not None
    return out.detach(), q.grad


def test_attention_runs_in_the_kernel_that_is_said() -> None:
    plain, exact = attended("auto"), attended("math")
    assert all(torch.equal(a, b) for a, b in zip(attended("flash"), plain, strict=True))  # the CPU's choice
    assert not torch.equal(exact[0], plain[0])
    torch.testing.assert_close(exact, plain)
    with attention("math"):
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_kernel_that_is_not_there_is_told_by_its_key() -> None:
    with pytest.raises(RuntimeError) as caught:
        attended("cudnn")
    assert "run.attention" in str(explained(caught.value))
    assert explained(RuntimeError("something else")) is None


def test_compiled_blocks_compute_the_same() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 8)
    plain = model(x)
    compile_blocks(model)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_has_blocks_to_compile(name: str) -> None:
    family = FAMILIES.module(name).tiny()
    backbone = FAMILIES.module(name).load(family.source.settings).components[family.backbone]
    compile_blocks(backbone)
    compiled = [block for block in backbone.modules() if block._compiled_call_impl is not None]
    assert len(compiled) > 1
    assert not any(inner is not block and inner in compiled for block in compiled for inner in block.modules())
    convolutions = any(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in backbone.modules())
    if family.backbone == "unet":
        assert convolutions
        use_channels_last(backbone)
        assert backbone.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    elif not convolutions:
        with pytest.raises(InputError, match=r"run\.channels_last"):
            use_channels_last(backbone)


def test_a_model_without_repeated_blocks_and_a_failed_compilation_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"run\.compile: diffusers names no blocks"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)))

    def broken(graph: object, inputs: object) -> None:
        raise ValueError("no compiler here")

    monkeypatch.setattr(execution, "BACKEND", broken)
    model = Model()
    compile_blocks(model)
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(1, 8))
    assert "run.compile: torch could not compile" in str(explained(caught.value))
