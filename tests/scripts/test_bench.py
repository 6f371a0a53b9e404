"""The measurements measure: the floor trains the same layers on the same model, and ratios are those of pairs."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from bench import compute, floor, memory, meter, profile, shapes, train
from torch.nn import functional as F

TINY = ["--shape", "embedded", "--photos", "2"]


def test_a_ratio_is_of_pairs_and_says_how_sure_it_is() -> None:
    machine = [1.0, 5.0, 1.0, 3.0, 2.0, 1.0, 4.0, 1.0]  # what else runs slows both
    found = meter.ratio([1.1 * seconds for seconds in machine], machine)
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1)) and found.pairs == 8
    spread = meter.ratio([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [1.0] * 9)
    assert (spread.low, spread.median, spread.high) == (2.0, 5.0, 8.0)
    few = meter.ratio([1.0, 2.0, 3.0], [1.0] * 3)
    assert (few.low, few.high) == (1.0, 3.0), "of few pairs all"


def test_children_count() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    assert 0.25 < train.spent_by([sys.executable, "-c", burn]) < 2
    before = meter.cpu_seconds()
    train.spent_by([sys.executable, "-c", burn])
    assert meter.cpu_seconds() - before > 0.25


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


# of models, which are measured in their true sizes; and settings that change no number of operations
KINDS = {"tiny": "model.quantize='nf4'", "tiny-sdxl": "model.compute='int8'", "tiny-flux": "model.quantize='int8'"}


def test_every_kind_of_model_that_is_measured_is_tried_here() -> None:
    assert {shapes.SHAPES[name].family for name in KINDS} == {shape.family for shape in shapes.SHAPES.values()}


@pytest.mark.parametrize("name", KINDS)
def test_the_floor_asks_the_model_as_we_do_and_adapts_the_same_layers(name: str, bases: Path) -> None:
    from lorakit import families
    from lorakit.adapters import ADAPTERS, state

    base = shapes.base(name, bases)
    model, family = floor.model(base, torch.float32), families.load(shapes.SHAPES[name].family, str(base))
    backbone = family.components[family.backbone]
    x0, u = torch.randn(2, *family.latent_shape(64, 64)), torch.tensor([0.25, 0.75])
    x_t, t, _ = model.noised(x0, torch.randn(x0.shape), u)
    read = floor.reader(base, torch.float32)
    captions = ["a photo of a dog", "a cat on the red picture"]
    with torch.no_grad():
        text = family.encode_text(captions)
        theirs = [read(caption) for caption in captions]
        assert {*theirs[0]} == {*text}
        for part, states in text.items():
            torch.testing.assert_close(torch.cat([one[part] for one in theirs]), states)
        torch.testing.assert_close(model.predict(x_t, t, text), family.predict(x_t, t, text))
    trained = floor.adapted(model.backbone, model.targets, rank=8)
    lora = ADAPTERS.module("lora")
    lora.inject(backbone, lora.Settings(rank=8), targets=family.default_targets[family.backbone], seed=0)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert {path for path, _ in state.adapter_layers(backbone)} == {
        path for path, _ in state.adapter_layers(model.backbone)
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_is_trained_beside_the_floor(name: str, bases: Path, tmp_path: Path) -> None:
    file, words = tmp_path / "found.json", ["--shape", name, "--photos", "2", "--bases", str(bases)]
    train.main(["steps", *words, "--pairs", "1", "--floor-checkpointing", "--json", str(file)])
    [row] = json.loads(file.read_text())["steps"]
    assert row["ratio"]["pairs"] == 1
    profile.main([*words, "--steps", "1", "--set", KINDS[name], "--json", str(file)])
    quantised = json.loads(file.read_text())
    profile.main([*words, "--steps", "1", "--set", "adapter.fused=false", "--json", str(file)])
    assert json.loads(file.read_text())["operations"] == quantised["operations"] > 0


@pytest.mark.parametrize("name", KINDS)
def test_the_floor_goes_from_nothing(
    name: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = shapes.photos(tmp_path, side=64, count=2)
    floor.main([str(shapes.base(name, bases)), str(photos), "--side", "64", "--more", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["a_step"] < found["cpu_seconds"]


def test_operations_are_those_of_the_way_there_and_back() -> None:
    x, weight, q, k = torch.randn(3, 5), torch.randn(7, 5), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 9, 4)

    def forward() -> None:
        F.linear(x, weight)
        F.scaled_dot_product_attention(q, k, value=k)

    # two products with the weight; attention's two with the keys' length, and four on the way back
    assert profile.operations(forward) == 2 * (2 * 3 * 5 * 7) + 6 * (2 * 2 * 6 * 9 * 4)


def test_steps_alternate_with_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "steps.json"
    words = ["steps", *TINY, "--pairs", "2", "--json", str(file)]
    train.main([*words, "--set", "adapter.fused=false"])
    [row] = json.loads(file.read_text())["steps"]
    assert row["settings"] == "adapter.fused=false"
    assert row["ratio"]["pairs"] == 2 and 0 < row["ratio"]["low"] <= row["ratio"]["high"]
    assert "| embedded | adapter.fused=false |" in capsys.readouterr().out


def test_another_programs_step_is_what_more_of_them_cost(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom pathlib import Path\nbase, pictures, out, batch, steps, each = sys.argv[1:]\n"
        "Path(base, 'unet').stat(), Path(pictures, 'metadata.jsonl').stat(), Path(out).mkdir()\nassert batch == '2'\n"
        "while time.process_time() < float(each) * int(steps): pass\n"
    )
    command = f"{sys.executable} {program} {{base}} {{pictures}} {{out}} {{batch}} {{steps}}"
    commands = [f"{command} 0.1", f"{command} 0.2"]
    file = tmp_path / "beside.json"
    said = [word for command in commands for word in ("--command", command)]
    train.main(["beside", *TINY, "--rounds", "1", "--pairs", "4", *said, "--json", str(file)])
    first, second = json.loads(file.read_text())["beside"]
    assert (*first["a_step"], *second["a_step"]) == pytest.approx((0.1, 0.2), rel=0.3)
    assert second["of_the_first"]["median"] == pytest.approx(2, rel=0.3)


def test_preparing_is_told_in_steps_of_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prepare.json"
    train.main(["prepare", *TINY, "--rounds", "1", "--json", str(file)])
    [row] = json.loads(file.read_text())["prepare"]
    assert row["steps"]["median"] == pytest.approx(row["ours"][0] / row["a_step"][0]) and row["ours"][0] > 0.01
    assert "| embedded | 2 |" in capsys.readouterr().out


def test_the_parts_of_a_step_make_it_up(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.main([*TINY, "--steps", "3", "--set", "run.precision=bf16", "run.accumulate=2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found.pop("casts")["aten::_foreach_copy_"] == 1, "all adapters together"
    assert found.pop("kept") > 0
    operations, ceiling, step = (found.pop(name) for name in ("operations", "ceiling", "step"))
    assert sum(found.values()) == pytest.approx(step)
    assert found["the frozen forward"] > 0 and found["backward"] > 0 and operations / step < ceiling


def test_all_micro_steps_are_in_the_parts_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "clock", itertools.count().__next__)  # a second passes between two looks at it
    file, found = tmp_path / "profile.json", []
    words = [*TINY, "--photos", "6", "--steps", "2", "--json", str(file)]
    for micro_steps in (1, 3):
        profile.main([*words, "--set", f"run.accumulate={micro_steps}"])
        found.append(json.loads(file.read_text()))
    one, three = found
    assert (one["backward"], one["step"]) == (2, 9) and (three["backward"], three["step"]) == (6, 17)
    assert one["all else on the host"] == three["all else on the host"] - 2
    assert three["operations"] == 3 * one["operations"]


def test_memory_is_measured_of_steps_and_of_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ROWS", [("run.batch_size=1", "run.accumulate=2")])
    file = tmp_path / "memory.json"
    memory.main(["settings", "parts", "estimate", *TINY[:2], "--batch", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    [row] = found["settings"].values()
    assert 100 * memory.MIB < row["before"] <= row["peak"] + memory.MIB and row["seconds"] > 0 < row["operations"]
    assert found["parts"].keys() == {"all parts kept and read", "as it is"}
    assert all({*of} == {"read", "step", "verified"} for of in found["parts"].values())
    assert 0.85 < found["estimate"]["ratio"] < 1.15, "run.fit goes by it"
    assert "| `run.batch_size=1`, `run.accumulate=2` |" in capsys.readouterr().out


def test_losses_are_apart_as_a_whole_and_in_their_worst_stretch() -> None:
    plain = [1.0] * 300
    assert compute.apart(plain, plain) == (0, 0)
    other = [1.0] * 100 + [1.06] * 100 + [1.0] * 100
    assert compute.apart(other, plain) == pytest.approx((0.02, 0.06))


@pytest.mark.slow
def test_trainings_and_layers_in_8_bits_are_set_beside_plain_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "LAYERS", {device: [(32, 16, 48)] for device in ("cpu", "cuda")})
    monkeypatch.setattr(compute, "KINDS", ("int8",))
    file = tmp_path / "compute.json"
    compute.main(["losses", "products", "--shape", "embedded", "--side", "64", "--steps", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    losses = found["losses"]
    assert losses.keys() == {"bf16", "int8", "fp32"} and len({tuple(of) for of in losses.values()}) == 3
    assert losses["int8"] == pytest.approx(losses["bf16"], rel=0.02)
    [row] = found["products"]
    assert row["layer"] == [32, 16, 48] and row["full"] > 0 and row["eight"] > 0
    assert "| bf16, `model.compute=int8` |" in capsys.readouterr().out
