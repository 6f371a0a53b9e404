"""How the backbone is executed: what is said is done, and what cannot be is refused by its key."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.adapters import lora
from lorakit.core.errors import InputError
from lorakit.families import FAMILIES, sd
from lorakit.training import execution
from lorakit.training.execution import (
    attention,
    compile_blocks,
    compute_again,
    explained,
    use_channels_last,
)
from lorakit.training.savings import counted

ROOT = Path(__file__).parents[2]


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


def test_compiled_blocks_compute_the_same_and_are_kept_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 8)
    plain, cache = model(x), tmp_path / "a" / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compile_blocks(model, cache=cache)
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    limits = torch._dynamo.config
    assert limits.accumulated_recompile_limit >= len(model.blocks) * limits.recompile_limit, "torch stops at the lower"
    torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)
    assert any(cache.rglob("*.py")) and any((cache / "fxgraph").rglob("*")) and cache.stat().st_mode & 0o077 == 0


def test_what_is_compiled_goes_with_the_process_unless_it_is_to_be_kept() -> None:
    ask = "import os; from lorakit.training import execution as e; from tests.training.test_execution import Model; "
    ask += "e.compile_blocks(Model()); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT)
    folder = Path(done.stdout.strip())
    assert folder.name.startswith("lorakit-compiled-") and not folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_a_folder_where_others_may_write_is_no_place_for_code(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InputError, match=r"run\.compile_cache = .*shared: others may write there"):
        compile_blocks(Model(), cache=shared)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run\.compile_cache = .*cannot be had"):
        compile_blocks(Model(), cache=tmp_path / "file")


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


def test_of_a_share_of_the_blocks_is_kept_between_all_and_nothing() -> None:
    family = sd.load(sd.Settings(path=str(sd.tiny().path)))
    lora.inject(family.unet, lora.Settings(rank=2), targets=["to_q", "to_k"], seed=0)
    family.unet.train()
    kept: dict[float, int] = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        if share:
            compute_again(family.unet, share=share)
        with counted(SimpleNamespace(adapted={"unet": family.unet})) as found:  # type: ignore[arg-type]
            out = family.predict(torch.ones(1, 4, 16, 16), torch.tensor([5.0]), {"states": torch.ones(1, 16, 24)})
        kept[share] = found.bytes
        del out
    assert sorted(kept, key=lambda share: kept[share], reverse=True) == list(kept)
    assert len({*kept.values()}) == 5


def test_blocks_of_few_weights_are_computed_again_first(monkeypatch: pytest.MonkeyPatch) -> None:
    unet: Any = sd.load(sd.Settings(path=str(sd.tiny().path))).unet.train()
    asked: set[Any] = set()
    again: set[Any] = set()
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([5.0]), torch.ones(1, 16, 24)
    unet.enable_gradient_checkpointing(lambda block, *args: asked.add(block) or block(*args))
    unet(*inputs)
    monkeypatch.setattr(execution, "checkpoint", lambda block, *args, **_: again.add(block) or block(*args))
    compute_again(unet, share=0.5)
    unet(*inputs)
    sizes = {block: sum(weight.numel() for weight in block.parameters()) for block in asked}
    assert 0.3 * len(asked) <= len(again) <= 0.7 * len(asked)
    assert max(sizes[block] for block in again) <= min(sizes[block] for block in asked - again)


def test_compiled_blocks_are_computed_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")  # a compiler's way, without its machine code
    found = []
    for compiled in (False, True):
        family = sd.load(sd.Settings(path=str(sd.tiny().path)))
        lora.inject(family.unet, lora.Settings(rank=2), targets=["to_q"], seed=0)
        family.unet.train()
        if compiled:
            compute_again(family.unet, share=0.5)
            compile_blocks(family.unet)
        out = family.predict(torch.ones(1, 4, 8, 8), torch.tensor([5.0]), {"states": torch.ones(1, 16, 24)})
        out.square().sum().backward()
        found.append([p.grad for p in family.unet.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
