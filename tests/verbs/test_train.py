"""Training from end to end on the tiny model: what a run leaves, and that it is the same however it came about."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lorakit
from lorakit.core.errors import DivergedError, InputError, InterruptedRun
from lorakit.families import sd
from lorakit.recipe import Recipe
from lorakit.sampling.pictures import Request, draw
from lorakit.training import loop
from lorakit.training.metrics import MetricsFile
from lorakit.training.step import StepReport, Trainee, run_step
from lorakit.verbs.train import dry_run, resume, train
from tests.verbs.conftest import write_pictures

Make = Callable[..., Recipe]

RANDOM = (  # settings of the objective that draw more, or otherwise, for each sample
    'timesteps={kind="uniform",stratified=true}',
    "noise.offset={strength=0.3,adaptive=0.1,random=true}",
    "noise.pyramid={}",
    "noise.perturbation={random=true}",
)


def records(run: Path) -> list[dict]:  # type: ignore[type-arg]
    """The metrics without what is a matter of time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def adapter(run: Path) -> bytes:
    return (run / "adapter.safetensors").read_bytes()


def assert_same(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    assert adapter(one) == adapter(other)


def stopped(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, name: str, *overrides: str, at: int) -> Path:
    """A run that a SIGTERM ended after step `at`."""
    write = MetricsFile.write

    def write_and_stop(self: MetricsFile, record: dict) -> None:  # type: ignore[type-arg]
        write(self, record)
        if record["step"] == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = make_recipe(name, *overrides)
    with monkeypatch.context() as patch, pytest.raises(InterruptedRun) as caught:
        patch.setattr(MetricsFile, "write", write_and_stop)
        train(recipe)
    assert caught.value.exit_code == 143
    run = Path(recipe.run.output)
    assert json.loads((run / "exit.json").read_text())["code"] == 143
    return run


def test_what_a_run_leaves(make_recipe: Make) -> None:
    result = train(make_recipe("run", "run.sample_every=3"))
    run = result.output
    assert result.steps == 6 and result.adapter == run / "adapter.safetensors"
    assert {p.name for p in run.iterdir()} == {
        "recipe.toml",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "adapter.safetensors",
        "adapters",
        "check.json",
        "examples.jsonl",
        "exit.json",
        "report.html",
    }
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000003", "step-000006"]
    assert [p.name for p in sorted((run / "adapters").iterdir())] == [
        "step-000003.safetensors",
        "step-000006.safetensors",
    ]
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    lines = records(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2, 2]
    for epoch in range(3):
        seen = [key for line in lines if line["epoch"] == epoch for key in line["samples"]]
        assert sorted(seen) == [f"0/{i:02d}.png" for i in range(7)], "each picture once an epoch"
    state = json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text())
    assert state["step"] == 6 and state["global_batch"] == 4 and state["steps_per_epoch"] == 2


def test_the_stock_pipeline_draws_what_training_drew_bit_for_bit(make_recipe: Make) -> None:
    result = train(make_recipe("run", "run.sample_every=6", "adapter.text_encoder.rank=2"))
    own = np.asarray(Image.open(result.output / "samples" / "step-000006" / "00.png"))
    stock = sd.tiny().stock_pipeline()
    request = Request("thing 1", seed=0, width=32, height=32)
    before = draw(stock, [request], steps=2, guidance=5.0)[0]
    stock.load_lora_weights(result.output, weight_name="adapter.safetensors")
    after = draw(stock, [request], steps=2, guidance=5.0)[0]
    assert np.array_equal(np.asarray(after), own)
    assert not np.array_equal(np.asarray(before), own), "the adapter does something"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), {"unet"}),
        (("adapter.text_encoder.rank=2",), {"unet", "text_encoder"}),
        (("data.cache_latents=false",), {"unet", "vae"}),
    ],
)
def test_steps_are_done_with_what_they_need_alone(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kept: set[str]
) -> None:
    held: list[set[str]] = []

    def stepping(trainee: Trainee, *args: Any, **more: Any) -> StepReport:
        parts = trainee.family.components.items()
        held.append({name for name, part in parts if not next(part.parameters()).is_meta})
        return run_step(trainee, *args, **more)

    monkeypatch.setattr(loop, "run_step", stepping)
    result = train(make_recipe("run", "run.sample_every=1", "run.steps=3", *words))
    assert held == [kept] * 3
    assert len([*result.output.glob("samples/*/*.png")]) == 3, "drawing has all parts"


def test_two_equal_runs_give_the_same_bytes(make_recipe: Make) -> None:
    torch.manual_seed(1)
    one = train(make_recipe("one"))
    torch.manual_seed(2)
    other = train(make_recipe("other", "data.workers=2"))
    assert_same(one.output, other.output)
    third = train(make_recipe("third", "run.seed=1"))
    assert adapter(third.output) != adapter(one.output)


MORE_RANDOM = [
    "adapter.text_encoder.rank=2",
    "adapter.dropout=0.3",
    "run.accumulate=1",
    *(f"objective.{setting}" for setting in RANDOM),
]


IN_EIGHT_BITS = [
    "model.compute=fp8",
    "model.quantize=fp8",
    "run.gradient_checkpointing=true",
    "adapter.text_encoder.rank=2",
]


IN_HALF = ["run.precision=bf16", "adapter.targets=all+conv", "run.ema.decay=0.5", "run.sample_every=2"]


@pytest.mark.parametrize("extra", [[], MORE_RANDOM, IN_EIGHT_BITS, IN_HALF])
def test_a_stopped_run_goes_on_bit_for_bit(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: list[str]
) -> None:
    whole = train(make_recipe("whole", *extra)).output
    run = stopped(make_recipe, monkeypatch, "stopped", *extra, at=4)
    assert records(run) == records(whole)[:4]
    moved = run.rename(tmp_path / "moved")
    torch.manual_seed(7)
    assert resume(moved).steps == 6
    assert_same(moved, whole)


def test_a_run_killed_before_its_first_checkpoint_starts_at_step_0(make_recipe: Make) -> None:
    whole = train(make_recipe("whole")).output
    killed = Path(shutil.copytree(whole, whole.parent / "killed"))
    shutil.rmtree(killed / "checkpoints")
    (killed / "adapter.safetensors").unlink()
    (killed / "lock").write_text("1\n")
    resume(killed)
    assert_same(killed, whole)


def test_a_damaged_checkpoint_is_passed_over(make_recipe: Make) -> None:
    whole = train(make_recipe("whole")).output
    damaged = Path(shutil.copytree(whole, whole.parent / "damaged"))
    (damaged / "checkpoints" / "step-000006" / "optimizer.safetensors").write_bytes(b"")
    resume(damaged)
    assert_same(damaged, whole)


def test_a_resume_refuses_other_data_other_settings_and_no_run(make_recipe: Make, tmp_path: Path) -> None:
    run = train(make_recipe("run")).output
    with pytest.raises(InputError, match="optimizer.lr differs"):
        resume(run, overrides=["optimizer.lr=0.5"])
    with pytest.raises(InputError, match="has done 6 steps already"):
        resume(str(run), overrides=["run.steps=3"], allow=["run.steps"])
    with pytest.raises(InputError, match=r"Did you mean optimizer.lr\?"):
        resume(run, allow=["optimizer.lrr"])
    with pytest.raises(InputError, match="global batch of 4"):
        resume(run, overrides=["run.batch_size=3"], allow=["run.batch_size"])
    with pytest.raises(InputError, match="no recipe.toml"):
        resume(tmp_path)
    photos = tmp_path / "photos"
    (photos / "00.txt").write_text("another caption")
    (photos / "01.png").rename(photos / "99.png")
    (photos / "01.txt").rename(photos / "99.txt")
    with pytest.raises(InputError, match="not those that this run was started with") as caught:
        resume(run)
    assert [problem.partition(",")[0] for problem in caught.value.problems[1:]] == [
        "0/00.png has changed",
        "0/99.png is new: take it out.",
        "0/01.png is gone: put it back.",
    ]


def test_a_checkpoint_of_another_run_is_refused(make_recipe: Make) -> None:
    run = train(make_recipe("run", "run.steps=3")).output
    other = train(make_recipe("other", "run.steps=3", "run.seed=5", "optimizer.lr=0.02")).output
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(InputError) as caught:
        resume(run)
    assert [problem.split(" than ")[0] for problem in caught.value.problems] == [
        "step-000003 was written with another optimizer.lr",
        "step-000003 was written with another run.seed",
    ]
    assert resume(run, allow=["optimizer.lr", "run.seed"]).steps == 3


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_resume_on_another_base_is_refused(part: str, make_recipe: Make, tmp_path: Path) -> None:
    model = shutil.copytree(sd.tiny().path, tmp_path / "model")
    run = train(make_recipe("run", f"model.path={model}", "run.steps=3")).output
    before = (model / part).stat()
    data = bytearray((model / part).read_bytes())
    data[-1] = ord(" ") if part.endswith("json") else data[-1] ^ 1
    (model / part).write_bytes(data)
    os.utime(model / part, ns=(before.st_atime_ns, before.st_mtime_ns))
    more = ["run.steps=6"], ["run.steps"]
    with pytest.raises(InputError, match=rf"model\.path: the files of {part.partition('/')[0]} are not those"):
        resume(run, overrides=more[0], allow=more[1])
    assert resume(run, overrides=more[0], allow=[*more[1], "model.path"]).steps == 6
    assert resume(run).steps == 6, "from now on it is the run's own"


def test_a_kernel_that_is_not_to_be_had_is_told_and_leaves_no_run(make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.attention: torch has no such kernel"):
        train(make_recipe("run", "run.attention=efficient"))
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_weights_that_a_cpu_does_not_compute_with_are_told(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"model\.dtype: a CPU does not compute"):
        train(make_recipe("run", "model.dtype=fp16", "run.precision=bf16"))


def test_sizes_that_the_model_does_not_draw_are_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"sample.width = 33.*multiples of 8"):
        train(make_recipe("run", "sample.width=33"))


def test_an_objective_that_says_nothing_for_the_model_is_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="objective.weighting") as caught:
        train(make_recipe("run", 'objective.weighting.kind="snr_v"', "sample.width=33"))
    assert len(caught.value.problems) == 2 and not Path(make_recipe("run").run.output).exists()


def test_what_counts_and_what_it_costs_reaches_the_training(make_recipe: Make) -> None:
    plain = records(train(make_recipe("plain", "run.steps=1")).output)[0]["loss"]
    for i, changed in enumerate(
        ('timesteps={kind="logit_normal"}', 'weighting={kind="debiased"}', 'loss={kind="l1"}', *RANDOM[:2])
    ):
        assert records(train(make_recipe(str(i), f"objective.{changed}", "run.steps=1")).output)[0]["loss"] != plain


def test_samples_of_nothing_and_a_process_alone_are_told_of(
    make_recipe: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():  # of --num_processes 2
        monkeypatch.setenv(name, value)
    train(make_recipe("run", "run.sample_every=1", "sample.prompts=[]", "run.steps=2"))
    assert caplog.text.count("run.sample_every draws nothing without sample.prompts") == 1
    assert caplog.text.count("has started this one alone") == 1


def test_a_negative_prompt_that_is_not_used_is_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"sample\.negative_prompt has no effect with sample\.guidance of 1"):
        train(make_recipe("run", "sample.guidance=1", "sample.negative_prompt=red"))


def test_what_is_of_no_use_to_the_model_is_said(make_recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    dry_run(make_recipe("run", "model.path=embedded", "data.buckets.resolution=64", "objective.noise.offset={}"))
    assert "objective.noise.offset: this model's last step is pure noise" in caplog.text


def test_a_rate_that_is_hardly_meant_is_said(make_recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    train(make_recipe("run", "optimizer.kind=prodigy", "optimizer.lr=5e-4", "run.steps=1"))
    assert "multiplies the rate that Prodigy finds" in caplog.text


def test_a_dry_run_needs_no_free_folder_and_leaves_none(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.steps=1")
    lines = dry_run(recipe)
    assert not Path(recipe.run.output).exists() and "2 × " in lines[0]
    train(recipe)
    assert len(dry_run(recipe)) == len(lines)


def test_the_best_checkpoints_are_kept_at_the_end(make_recipe: Make) -> None:
    how = ["data.validation=0.3", "run.validate_every=1", "run.save_every=1", "run.keep_last=1", "run.keep_best=2"]
    run = train(make_recipe("run", *how)).output
    losses = {
        line["step"]: line["loss"] for line in map(json.loads, (run / "validation.jsonl").read_text().splitlines())
    }
    best = sorted(range(1, 7), key=lambda step: losses[step])[:2]
    kept = {int(path.name[5:]) for path in (run / "checkpoints").iterdir()}
    assert kept == {*best, 6} and len(list((run / "adapters").iterdir())) == 6
    with pytest.raises(InputError, match="run.keep_best"):
        train(make_recipe("other", "run.keep_best=1"))


def test_a_failure_before_the_first_step_leaves_the_folder_to_the_mended_recipe(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"adapter\.targets"):
        train(make_recipe("run", 'adapter.targets=["nothing"]'))
    assert train(make_recipe("run", "run.steps=1")).steps == 1


def test_a_setting_that_came_with_a_later_version_has_not_been_changed(make_recipe: Make) -> None:
    run = train(make_recipe("run", "run.steps=3")).output
    file = run / "recipe.toml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "deterministic" not in line))
    assert resume(run).steps == 3


def test_more_steps_are_asked_for_by_name_and_stretch_the_schedule(
    make_recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(make_recipe("whole")).output
    run = train(make_recipe("run", "run.steps=3")).output
    with pytest.raises(InputError, match="run.steps differs"):
        resume(run, overrides=["run.steps=6"])
    assert resume(run, overrides=["run.steps=6"], allow=["run.steps"]).steps == 6
    assert "the rate may jump" in caplog.text
    assert [r["lr"] for r in records(run)][3:] == [r["lr"] for r in records(whole)][3:]


def test_the_global_batch_may_be_split_otherwise(make_recipe: Make) -> None:
    drawn = [f"objective.{setting}" for setting in RANDOM]
    one = train(make_recipe("one", "run.batch_size=4", "run.accumulate=1", *drawn)).output
    other = train(make_recipe("other", "run.batch_size=1", "run.accumulate=4", "data.workers=1", *drawn)).output
    for a, b in zip(records(one), records(other), strict=True):
        assert a["samples"] == b["samples"] and a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_regularization_source_makes_half_of_an_epoch(make_recipe: Make, tmp_path: Path) -> None:
    write_pictures(tmp_path / "kept", 3, first=20)
    source = f'data.sources.1={{path="{tmp_path}/kept", role="regularization", weight=0.5}}'
    run = train(make_recipe("run", source, "run.steps=4")).output
    keys = [key for line in records(run) for key in line["samples"]]
    assert len(keys) == 14 and sum(key.startswith("1/") for key in keys) == 7


def test_a_picture_that_is_left_out_is_named(
    make_recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe("run", "data.on_bad_image=skip", "run.steps=1")
    (tmp_path / "photos" / "03.png").write_bytes(b"no picture")
    run = train(recipe).output
    assert "left out: 0/03.png" in caplog.text
    assert any("0/03.png" in text for text in json.loads((run / "check.json").read_text())["skipped"])


def test_other_precisions_and_options_train(make_recipe: Make) -> None:
    for name, override in [("bf16", "run.precision=bf16"), ("checkpointing", "run.gradient_checkpointing=true")]:
        run = train(make_recipe(name, override, "run.steps=2", "adapter.text_encoder.rank=2")).output
        tensors = load_file(run / "checkpoints" / "step-000002" / "adapter.safetensors")
        assert all(t.dtype == torch.float32 for t in tensors.values())
        assert sum(int(t.count_nonzero() > 0) for n, t in tensors.items() if "lora_B" in n) == sum(
            "lora_B" in n for n in tensors
        ), "every layer has learned"


def test_gradient_checkpointing_does_not_change_the_numbers(make_recipe: Make) -> None:
    plain = train(make_recipe("plain", "run.steps=2")).output
    less = train(make_recipe("less", "run.steps=2", "run.gradient_checkpointing=true")).output
    assert [r["loss"] for r in records(plain)] == [r["loss"] for r in records(less)]


def test_epochs_in_place_of_steps(make_recipe: Make) -> None:
    recipe = make_recipe("run")
    recipe = lorakit.recipe.build(
        {**recipe.to_dict(), "run": {**recipe.run.model_dump(exclude={"steps"}), "epochs": 2}}
    )  # type: ignore[attr-defined]
    assert train(recipe).steps == 4


def test_a_run_that_diverges_says_with_which_pictures(make_recipe: Make) -> None:
    recipe = make_recipe("run", "optimizer.lr=1e30", "optimizer.max_grad_norm=0", "run.steps=30", "run.save_every=0")
    with pytest.raises(DivergedError, match=r"0/\d\d\.png"):
        train(recipe)
    run = Path(recipe.run.output)
    assert json.loads((run / "exit.json").read_text())["code"] == 3
    assert [record["loss"] for record in records(run)][-3:] == [None] * 3, "what went wrong can be read"
    assert not (run / "checkpoints").exists()
    tensors = load_file(run / "adapter.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values()), "the last good weights"


def test_fp16_without_a_gpu_is_refused(make_recipe: Make) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="fp16"):
        train(make_recipe("run", "run.precision=fp16"))


def test_each_part_has_its_own_learning_rate(make_recipe: Make) -> None:
    schedule = "optimizer.schedule.kind=constant"
    recipe = make_recipe("run", schedule, "run.steps=1", "adapter.lr=0.5", "adapter.text_encoder={rank=2, lr=0.25}")
    record = records(train(recipe).output)[0]
    assert record["lr"] == 0.5 and record["lr_text_encoder"] == 0.25


def test_a_tracker_that_is_not_installed_is_refused(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.training.trackers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"lorakit\[wandb\]"):
        train(make_recipe("run", 'run.trackers=["wandb"]'))


def test_tensorboard_gets_the_numbers(make_recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    run = train(make_recipe("run", 'run.trackers=["tensorboard"]', "run.steps=2")).output
    assert list(run.rglob("events.out.tfevents*"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(make_recipe: Make, precision: str) -> None:
    recipe = make_recipe("run", f"run.precision={precision}", "adapter.text_encoder.rank=2", "run.sample_every=6")
    run = train(recipe).output
    assert sum(record["loss"] is not None for record in records(run)) >= 3
    tensors = load_file(run / "checkpoints" / "step-000006" / "adapter.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
