"""lorakit/export/alphas.py: what readers scale by is written where they look, and two places that disagree are told."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.export import DIALECTS
from tests.export import fuzz
from tests.export.tiny import same_state

ENTRY = "lora_adapter_metadata"
RANK = 4


def adapter(alpha: float) -> AdapterState:
    state = fuzz.adapter(rank=RANK)
    return AdapterState("lora", state.tensors, dict.fromkeys(state.alphas, alpha))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1.0, RANK / 2, RANK, 4.0 * RANK])
def test_alpha_stands_where_the_readers_of_a_dialect_look(alpha: float, rslora: bool) -> None:
    effective = float(torch.tensor(alpha * math.sqrt(RANK) if rslora else alpha))
    state, family = adapter(effective), fuzz.model()
    tensors, metadata = DIALECTS.module("kohya").write(state, family, {})
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {effective}
    assert ENTRY not in metadata
    tensors, metadata = DIALECTS.module("diffusers").write(state, family, {})
    entry = json.loads(metadata[ENTRY])
    assert (entry["unet.lora_alpha"], entry["unet.r"], entry["text_encoder.lora_alpha"]) == (effective, RANK, effective)
    assert not any(key.endswith(".alpha") for key in tensors), "diffusers refuses a file that has one"
    _, metadata = DIALECTS.module("peft").write(state, family, {})
    for component in ("unet", "text_encoder"):
        config = json.loads(metadata[f"{component}/adapter_config.json"])
        assert (config["lora_alpha"], config["r"], config.get("use_rslora", False)) == (effective, RANK, False)


numbers = st.floats(-1e4, 1e4, width=32, allow_nan=False)


@given(st.lists(numbers, min_size=5, max_size=5), st.lists(st.sampled_from(DIALECTS.names()), min_size=1, max_size=5))
def test_through_any_dialects_and_back_the_same_bits_whatever_the_alphas(
    alphas: list[float], through: list[str]
) -> None:
    whole, family = fuzz.adapter(rank=3), fuzz.model()
    state = AdapterState("lora", whole.tensors, dict(zip(whole.alphas, alphas, strict=True)))
    again = state
    for name in through:
        dialect = DIALECTS.module(name)
        tensors, metadata = dialect.write(again, family, {})
        again = dialect.read(tensors, metadata, family)
    assert same_state(again, state)


def written(format: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return DIALECTS.module(format).write(fuzz.adapter(), fuzz.model(), {})  # alphas 1 … 5


def refused(format: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        DIALECTS.module(format).read(tensors, metadata, fuzz.model())


def test_a_tensor_and_an_entry_that_disagree_are_an_error_and_that_agree_are_none() -> None:
    tensors, metadata = written("diffusers")
    for value, dtype in ((1.0, torch.float32), (1.0, torch.float16), (1, torch.int64)):
        alpha = {"unet.to_q.alpha": torch.tensor(value, dtype=dtype)}
        assert DIALECTS.module("diffusers").read({**tensors, **alpha}, metadata, fuzz.model())
    alpha = {"unet.to_q.alpha": torch.tensor(2.0)}
    refused(
        "diffusers",
        {**tensors, **alpha},
        metadata,
        r"unet\.to_q has two alphas, 1 by lora_adapter_metadata, 2 by unet\.to_q\.alpha",
    )
    # without an entry, what there is counts
    tensors |= {f"{key.removesuffix('.lora_A.weight')}.alpha": torch.tensor(9.0) for key in tensors if "_A" in key}
    read = DIALECTS.module("diffusers").read(tensors, {}, fuzz.model())
    assert set(read.alphas.values()) == {9.0}


def test_diffusers_entry_in_a_kohya_file_must_agree() -> None:
    tensors, metadata = written("kohya")
    _, other = written("diffusers")
    assert DIALECTS.module("kohya").read(tensors, {**metadata, ENTRY: other[ENTRY]}, fuzz.model())
    tensors["lora_unet_to_q.alpha"] = torch.tensor(7.0)
    refused(
        "kohya",
        tensors,
        {**metadata, ENTRY: other[ENTRY]},
        r"lora_unet_to_q has two alphas, .*1 by lora_adapter_metadata",
    )


def test_a_peft_folder_and_an_entry_in_its_file_must_agree() -> None:
    tensors, metadata = written("peft")
    entry: dict[str, Any] = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 6}
    # the folder's own configuration is what peft reads; what diffusers would read must say the same
    refused("peft", tensors, {**metadata, ENTRY: json.dumps(entry)}, "has two alphas")


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_another_rank_in_the_configuration_is_a_conflict(format: str) -> None:
    tensors, metadata = written(format)
    changed = {key: text.replace('r": 2', 'r": 8') for key, text in metadata.items()}
    assert changed != metadata
    refused(format, tensors, changed, "the rank 8, its matrices have 2")


def test_two_spellings_of_a_layer_are_told_whatever_their_alphas() -> None:
    tensors, metadata = written("kohya")
    tensors["lora_te1_text_model_fc1.alpha"] = torch.tensor(9.0)
    refused("kohya", tensors, metadata, "lora_te_text_model_fc1.alpha and lora_te1_text_model_fc1.alpha are the same")


def test_kohyas_note_is_no_alpha_but_is_told_where_one_is_missing() -> None:
    tensors, metadata = written("kohya")
    assert DIALECTS.module("kohya").read(tensors, {**metadata, "ss_network_alpha": "77"}, fuzz.model())
    del tensors["lora_unet_to_q.alpha"]
    refused("kohya", tensors, {**metadata, "ss_network_alpha": "77"}, "--assume-alpha .*a note in it says 77")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, 2.0]])
def test_what_is_no_number_is_told(value: Any) -> None:
    tensors, metadata = written("kohya")
    refused("kohya", {**tensors, "lora_unet_to_q.alpha": torch.tensor(value)}, metadata, "not one finite number")
