"""Preservation in closed form: a model whose adapter adds w · text, and so has drifted by that from its base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.settings import validate
from lorakit.core.types import Batch, LossReport, Text
from lorakit.diffusion import GaussianDiffusion
from lorakit.diffusion.objectives.denoising import Settings, build

PROCESS = GaussianDiffusion()
CLASS = (0.5, 2.0, 3.0, 1.0)


def states(values: Sequence[float]) -> Text:
    return {"states": torch.tensor(values).view(-1, 1, 1, 1)}


def batch() -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple("abcd"),
        numbers=(0, 1, 2, 3),
        captions=("a", "bb", "ccc", "dddd"),
        latents=torch.randn(4, 2, 4, 4, generator=g),
        noise=torch.randn(4, 2, 4, 4, generator=g),
        quantile=torch.linspace(0, 0.999, 4),
        weight=torch.ones(4),
        text=states([1.0, 2.0, 3.0, 4.0]),
        class_captions=("x", "xx", "xxx", "xxxx"),
        class_text=states(CLASS),
    )


class Model(nn.Module):
    """base · text, and with the adapter w · text more; a caption's text is its length. It notes how it is called."""

    def __init__(self, w: float = 0.3) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.tensor(0.7))
        self.w = nn.Parameter(torch.tensor(w))
        self.calls: list[tuple[bool, bool]] = []

    def __call__(self, x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        self.calls.append((adapter, torch.is_grad_enabled()))
        texts = ("a", "bb", "ccc", "dddd") if text is None else text
        states_ = texts["states"] if isinstance(texts, Mapping) else states([len(c) for c in texts])["states"]
        return (self.base + self.w * adapter) * states_ * torch.ones_like(x_t)


def objective(kind: str, **values: Any) -> Callable[[Any, Batch], LossReport]:
    own = {key: values.pop(key) for key in ("weight",) if key in values}
    return build(
        validate(Settings, {"preservation": {"kind": kind, **own}, **values}, where="objective", name="it"), PROCESS
    )


def kept(kind: str, given: Batch, model: Model | None = None, **values: Any) -> Tensor:
    found = objective(kind, **values)(model or Model(), given).preservation
    assert found is not None
    return found.detach()


@pytest.mark.parametrize("kind", ["differential_output", "blank_prompt"])
def test_a_drift_at_the_class_text_costs_its_square(kind: str) -> None:
    expected = torch.tensor([(0.3 * text) ** 2 for text in CLASS])
    torch.testing.assert_close(kept(kind, batch()), expected)
    torch.testing.assert_close(kept(kind, batch(), weight=0.25), expected / 4)
    # captions that are encoded in the step, where a text encoder is adapted
    live = replace(batch(), text=None, class_text=None)
    torch.testing.assert_close(kept(kind, live), torch.tensor([(0.3 * n) ** 2 for n in (1, 2, 3, 4)]))


def test_the_term_is_of_the_same_loss_and_weighting_as_denoising() -> None:
    snr = PROCESS.snr(torch.tensor([0, 333, 666, 999])).float()
    drift = torch.tensor([0.3 * text for text in CLASS])
    weighted = kept("differential_output", batch(), loss={"kind": "l1"}, weighting={"kind": "p2"})
    torch.testing.assert_close(weighted, drift / (1 + snr))


def test_the_denoising_loss_is_the_same_with_and_without() -> None:
    plain = objective("none")(Model(), batch())
    assert plain.preservation is None
    masked = replace(batch(), mask=torch.rand(4, 1, 4, 4))
    for kind in ("differential_output", "blank_prompt"):
        assert torch.equal(objective(kind)(Model(), batch()).per_example, plain.per_example)
    with_mask = objective("none")(Model(), masked).per_example
    assert torch.equal(objective("masked_prior")(Model(), masked).per_example, with_mask)


def test_a_sample_without_a_class_text_is_held_to_nothing() -> None:
    some = replace(batch(), class_captions=("x", None, "xxx", None))
    expected = torch.tensor([(0.3 * 0.5) ** 2, 0.0, (0.3 * 3) ** 2, 0.0])
    torch.testing.assert_close(kept("differential_output", some), expected)
    model = Model()
    none = replace(batch(), class_captions=(), class_text=None)
    assert kept("differential_output", none, model).tolist() == [0.0] * 4
    assert model.calls == [(True, True)], "what holds nothing costs nothing"


def test_masked_prior_holds_what_lies_outside_the_mask() -> None:
    mask = torch.ones(4, 1, 4, 4)
    mask[1, :, :2] = 0.0
    mask[2] = 0.25
    half = torch.full((4, 2, 4, 4), 1.0)
    half[1, :, 2:] = 100.0  # inside: what happens there is the picture's affair
    model = Model()

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        return half * model(x_t, t, text=text, adapter=adapter)

    found = objective("masked_prior")(predict, replace(batch(), mask=mask)).preservation
    assert found is not None
    # each at its own text; a mean over what is left out, as denoising's is over what is not
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, (0.3 * 2) ** 2, (0.3 * 3) ** 2, 0.0]))
    assert model.calls == [(True, True), (False, False)], "one forward more, without gradient"
    model.calls.clear()
    assert kept("masked_prior", batch(), model).tolist() == [0.0] * 4 and len(model.calls) == 1


@pytest.mark.parametrize("kind", ["differential_output", "blank_prompt", "masked_prior"])
def test_no_gradient_flows_into_the_base(kind: str) -> None:
    """With the teacher's graph cut, `base` has the gradient of the student alone; uncut, both would cancel to zero."""
    model, given = Model(), replace(batch(), mask=torch.zeros(4, 1, 4, 4))
    report = objective(kind)(model, given)
    assert report.preservation is not None
    report.preservation.sum().backward()
    texts = (1.0, 2.0, 3.0, 4.0) if kind == "masked_prior" else CLASS
    expected = sum(2 * 0.3 * text**2 for text in texts)
    assert model.base.grad is not None and model.w.grad is not None
    assert model.base.grad.item() == pytest.approx(expected, rel=1e-5)
    assert model.w.grad.item() == pytest.approx(expected, rel=1e-5)
    assert [grad for adapter, grad in model.calls if not adapter] == [False]


@pytest.mark.parametrize("kind", ["differential_output", "blank_prompt", "masked_prior"])
def test_an_adapter_that_changes_nothing_costs_exactly_nothing(kind: str) -> None:
    model, given = Model(w=0.0), replace(batch(), mask=torch.zeros(4, 1, 4, 4))
    report = objective(kind)(model, given)
    assert report.preservation is not None and report.preservation.tolist() == [0.0] * 4
    report.preservation.sum().backward()
    assert model.w.grad == 0, "nor does it pull"
