"""lorakit/adapters/targets.py: names and shapes alone say what is adapted, and every word must say something."""

import re

import pytest

from lorakit.adapters import adapter_state, lora, trainable_parameters
from lorakit.adapters.targets import choose
from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.families import sd

SHAPES: dict[str, tuple[int, ...]] = {
    **{
        f"up_blocks.{i}.attentions.{k}.attn{n}.to_{x}": (32, 32)
        for i in range(3)
        for k in range(2)
        for n in (1, 2)
        for x in "qkv"
    },
    **{f"up_blocks.{i}.attentions.0.ff.net.2": (32, 128) for i in range(3)},
    "up_blocks.0.resnets.0.conv1": (32, 4, 3, 3),
    "conv_out": (4, 32, 3, 3),
    "time_embedding.linear_1": (32, 32),
    "norm": (32,),
    "tokens.token_embedding": (99, 32),
    "single_transformer_blocks.0.attn.to_q": (32, 32),
    "single_transformer_blocks.0.proj_mlp": (128, 32),
    "single_transformer_blocks.0.proj_out": (32, 160),
}


def settings(**values: object) -> lora.Settings:
    return validate(lora.Settings, {"rank": 4, **values}, where="adapter", name="lora")


def ranks(*targets: str, **values: object) -> dict[str, int]:
    part = settings(targets=list(targets), **values)
    found = choose(SHAPES, part, targets, where="adapter")
    assert not found.problems
    return found.ranks


def problems(*targets: str, **values: object) -> list[str]:
    return choose(SHAPES, settings(**values), targets, where="adapter").problems


def test_presets_are_what_they_say() -> None:
    attention = {name for name in SHAPES if ".to_" in name}
    mlp = {name for name in SHAPES if "ff" in name or "single" in name}
    assert ranks("attention").keys() == attention
    assert ranks("attention+mlp").keys() == attention | mlp
    linear = {name for name, shape in SHAPES.items() if len(shape) == 2 and "token" not in name}
    assert ranks("all-linear").keys() == linear
    assert ranks("all+conv").keys() == linear | {"up_blocks.0.resnets.0.conv1", "conv_out"}
    assert ranks("attention", "conv_out").keys() == attention | {"conv_out"}, "presets and endings may be mixed"
    assert list(ranks("conv_out", "to_q")) == [n for n in SHAPES if n.endswith(("conv_out", "to_q"))], (
        "the model's order"
    )


def test_one_word_is_a_list_of_one() -> None:
    assert settings(targets="attention", blocks="mid_block") == settings(targets=["attention"], blocks=["mid_block"])


def test_blocks_are_names_in_a_row_whose_numbers_may_be_ranges() -> None:
    assert {name.split(".")[1] for name in ranks("to_q", blocks=["up_blocks.1-2"])} == {"1", "2"}
    assert {name.split(".")[3] for name in ranks("to_q", blocks=["up_blocks", "single_transformer_blocks.0-9"])} >= {
        "1"
    }
    assert ranks("to_q", blocks=["up_blocks.0.attentions.1"]).keys() == {
        f"up_blocks.0.attentions.1.attn{n}.to_q" for n in (1, 2)
    }
    assert ranks("to_q", blocks=["attentions.1"]) == ranks("to_q", blocks=["up_blocks.0-2.attentions.1"])


def test_the_last_pattern_that_matches_counts_and_it_alone() -> None:
    patterns = [{"match": "attn2", "rank": 8, "alpha": 3.0}, {"match": r"attn2\.to_v$", "rank": 2, "lr": 1e-3}]
    part = settings(targets=["attention"], alpha=2.0, patterns=[*patterns, {"match": "up_blocks.2", "rank": 0}])
    found = choose(SHAPES, part, ["attention"], where="adapter")
    plans = {name: part.plan_of(name, rank) for name, rank in found.ranks.items()}
    assert not found.problems and not any("up_blocks.2" in name for name in plans)
    for name, plan in plans.items():
        value, cross = name.endswith("attn2.to_v"), "attn2" in name
        assert (plan.rank, plan.alpha) == ((2, 2.0) if value else (8, 3.0) if cross else (4, 2.0)), name
        assert part.rate_of(name) == (("attn2_to_v", 1e-3) if value else None)
    assert part.rates() == {"lr": None, "patterns.1.lr": 1e-3}


def test_alpha_left_out_is_the_others_and_theirs_is_the_rank() -> None:
    patterns = [{"match": "attn2", "rank": 8}]
    assert settings(patterns=patterns).plan_of("x.attn2", 8).alpha == 8
    assert settings(patterns=patterns, alpha=2.0).plan_of("x.attn2", 8).alpha == 2
    assert settings(patterns=patterns, rslora=True).plan_of("x.attn2", 4).alpha == 8, "4 · sqrt(4)"


@pytest.mark.parametrize(
    ("targets", "values", "said"),
    [
        (["atention"], {}, "adapter.targets: .*'atention'. Did you mean attention"),
        (["to_k", "to_w"], {}, "adapter.targets: .*'to_w'. Did you mean to_"),
        (
            ["to_q"],
            {"blocks": ["up_blocks.3"]},
            "adapter.blocks: no layer lies in 'up_blocks.3'. Did you mean up_blocks.",
        ),
        (["to_q"], {"blocks": ["up_blocks.2-1"]}, "adapter.blocks: no layer lies in 'up_blocks.2-1'"),
        (
            ["conv1"],
            {"blocks": ["single_transformer_blocks"]},
            "adapter.blocks: no layer in .* is one of adapter.targets",
        ),
        (
            ["to_q"],
            {"patterns": [{"match": "up_blocks.*atn2", "rank": 1}]},
            "adapter.patterns.0.match = 'up_blocks..atn2' matches no layer's name. Did you mean attn2",
        ),
        (["to_q"], {"patterns": [{"match": "conv", "rank": 1}]}, "matches 2 layers, like .*conv1, and adapter.targets"),
        (
            ["to_q"],
            {"patterns": [{"match": "attn2", "rank": 1}, {"match": "attn", "rank": 2}]},
            "adapter.patterns.0.match = 'attn2': the last pattern",
        ),
        (["to_q"], {"patterns": [{"match": "to_q", "rank": 0}]}, "adapter.patterns leave all layers out"),
        (["to_q"], {"patterns": [{"match": "attn2", "rank": 33}]}, r"adapter.patterns.0.rank = 33 .* \(at most 32\)"),
        (["conv_out"], {"rank": 5}, r"adapter.rank = 5 .* \(at most 4\)"),
    ],
)
def test_what_says_nothing_is_named_with_what_is_near(targets: list[str], values: dict[str, object], said: str) -> None:
    (problem,) = problems(*targets, **values)
    assert re.search(said, problem), problem


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"match": "(", "rank": 1}, "adapter.patterns.0.match: '\\(' is no regular expression"),
        ({"match": "attn2"}, "adapter.patterns.0: a pattern says nothing"),
        ({"match": "attn2", "rank": 0, "lr": 1.0}, "adapter.patterns.0: rank = 0 leaves"),
        ({"match": "attn2", "rnak": 1}, "adapter.patterns.0.rnak is not a setting of lora. Did you mean rank?"),
    ],
)
def test_a_pattern_is_checked_before_any_model_is_there(pattern: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(patterns=[pattern])
    with pytest.raises(InputError, match="lr_attn2"):
        settings(patterns=[{"match": match, "lr": 1.0} for match in ("attn2", "attn2$")])


def test_a_model_is_adapted_as_planned_and_counted_without_it() -> None:
    family = sd.load(sd.Settings(path=str(sd.tiny().path)))
    part = settings(
        rank=2,
        patterns=[{"match": r"attn2", "rank": 5, "alpha": 1.5}, {"match": "proj_in", "rank": 0}],
        blocks="up_blocks",
    )
    targets = family.default_targets["unet"]
    lora.inject(family.unet, part, targets=targets, seed=0)
    state = adapter_state({"unet": family.unet})
    assert {name.split(".")[1] for name in state.layers()} == {"up_blocks"}
    for layer in state.layers():
        rank = 5 if "attn2" in layer else 2
        assert len(state.tensors[f"{layer}.lora_A.weight"]) == rank
        assert state.alphas[layer] == (1.5 if rank == 5 else 2) and "proj_in" not in layer
    shapes = sd.describe(sd.Settings(path=str(family.path))).weight_shapes("unet")
    assert lora.weight_count(shapes, part, targets) == sum(
        p.numel() for p in trainable_parameters({"unet": family.unet}).values()
    )
