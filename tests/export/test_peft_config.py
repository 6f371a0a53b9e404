"""lorakit/export/peft_config.py: ranks and alphas as peft gives them, to the first pattern that matches."""

import json
import math

import pytest

from lorakit.core.errors import InputError
from lorakit.export.peft_config import Config, read_config


def test_the_first_pattern_that_matches_counts_as_in_peft() -> None:
    patterns = {"to_q": 2, "mid.to_q": 3, "^mid.to_k": 4, "^to_k": 5}
    config = Config({"lora_alpha": 1, "alpha_pattern": patterns}, "it")
    found = {path: config.alpha(path, 8) for path in ("mid.to_q", "to_q", "up.to_q", "mid.to_k", "up.mid.to_k", "to_k")}
    from peft.utils.other import get_pattern_key

    assert found == {path: patterns.get(get_pattern_key(patterns, path), 1) for path in found}
    assert found == {"mid.to_q": 2, "to_q": 2, "up.to_q": 2, "mid.to_k": 4, "up.mid.to_k": 1, "to_k": 5}


def test_rank_stabilised_scaling_is_folded_into_alpha() -> None:
    assert Config({"lora_alpha": 3, "use_rslora": True}, "it").alpha("a", 8) == 3 * math.sqrt(8)
    assert Config({}, "it").alpha("a", 8) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"lora_alpha": "8"}', "gives as lora_alpha 8, which is no number"),
        ('{"lora_alpha": true}', "no number"),
        ('{"lora_alpha": 1e999}', "no number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern that is no table"),
        ('{"alpha_pattern": {"(a+)+": 1}}', "no plain name"),
        ('{"rank_pattern": {"a": null, "b": {}}}', "rank_pattern of b"),
        ('{"use_dora": true}', "sets use_dora.*merge_and_unload"),
        ('{"bias": "all", "peft_type": "PeftType.LOHA"}', "sets bias, peft_type"),
    ],
)
def test_what_means_something_else_or_nothing_is_told(config: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_config(config, "it")


def test_of_several_components_the_asked_one_is_read() -> None:
    text = json.dumps({"unet.lora_alpha": 1, "text_encoder.lora_alpha": 2, "unet.r": 4})
    assert read_config(text, "it", component="unet").alpha("a", 4) == 1
    assert read_config(text, "it", component="text_encoder").alpha("a", 9) == 2
    assert read_config(text, "it", component="vae").alpha("a", 4) is None
