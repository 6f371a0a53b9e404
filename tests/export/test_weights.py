"""lorakit/export/weights.py: one number or several, the longest name that fits a layer counts."""

import pytest

from lorakit.core.errors import InputError
from lorakit.export.weights import Weights
from tests.export import fuzz


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.8", Weights(0.8)),
        ("-1e-1", Weights(-0.1)),
        ("unet=0.8,text_encoder=0", Weights(1.0, {"unet": 0.8, "text_encoder": 0.0})),
        ("0.5, unet.up_blocks.1=2", Weights(0.5, {"unet.up_blocks.1": 2.0})),
        ("", None),
        ("x", None),
        ("unet=x", None),
        ("1,2", None),
        ("unet=1,2", None),
    ],
)
def test_what_is_written_is_read(text: str, found: Weights | None) -> None:
    assert Weights.parsed(text) == found


def test_the_longest_name_that_fits_counts() -> None:
    weights = Weights(0.5, {"unet": 2.0, "unet.deep": 3.0, "unet.deep.0": 4.0})
    found = {layer: weights.at(layer) for layer in ("text_encoder.fc1", "unet.to_q", "unet.deep.1", "unet.deep.0")}
    assert found == {"text_encoder.fc1": 0.5, "unet.to_q": 2.0, "unet.deep.1": 3.0, "unet.deep.0": 4.0}
    assert weights.at("unet.deeper") == 2.0, "names end at a full stop"


def test_a_state_is_as_strong_as_its_weights_say() -> None:
    state = fuzz.adapter()
    half = Weights.of({"unet": 0.5}).applied(state)
    assert half.tensors is state.tensors
    assert {layer: half.alphas[layer] / alpha for layer, alpha in state.alphas.items()} == {
        layer: 0.5 if layer.startswith("unet.") else 1.0 for layer in state.alphas
    }
    assert Weights.of(2).applied(state).alphas == {layer: 2 * alpha for layer, alpha in state.alphas.items()}


def test_a_name_of_no_layer_and_a_number_that_is_none_are_told() -> None:
    with pytest.raises(InputError, match=r"weight unett = 2: the adapter has no layer there\. Did you mean unet"):
        Weights(1.0, {"unett": 2.0}).applied(fuzz.adapter())
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="no finite number"):
            Weights(wrong)
        with pytest.raises(InputError, match="no finite number"):
            Weights.of({"unet": wrong})
