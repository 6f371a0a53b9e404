"""lorakit/verbs/provenance.py: what a run knows is in its adapter, goes with it, and names nobody."""

import getpass
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.files import split_safetensors
from lorakit.export import export_adapter
from lorakit.export.container import open_adapter
from lorakit.recipe import Recipe
from lorakit.verbs.train import train

ABOUT = ["run.about.author=A. N.", "run.about.license=CC0-1.0", "data.sources.0.trigger=qzx"]


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_SECRET", "a-token-of-somebody")
    recipe = make_recipe("run", *ABOUT, "data.sources.0.repeats=2", "run.steps=4", "run.save_every=2")
    captions = tmp_path / "photos"
    (captions / "00.txt").write_text("red, big, red")
    (captions / "01.txt").write_text("red, a sentence that tells much more of somebody than a tag would do")
    return train(recipe).output


def private(tmp_path: Path) -> set[str]:
    values = {value for name, value in os.environ.items() if len(value) > 8 or name in ("USER", "LOGNAME", "HOSTNAME")}
    host, user = socket.gethostname(), getpass.getuser()
    # a word as short as "root" is looked for as a part of a path or a value only
    return {str(tmp_path), str(Path.home()) + "/", host, f"/{user}/", f'"{user}"', *(v for v in values if len(v) > 5)}


def test_what_a_run_knows_is_in_its_adapter_and_goes_with_it(run: Path, tmp_path: Path) -> None:
    tensors, entries = open_adapter(run / "adapter.safetensors")
    wanted = {
        "ss_steps": "4",
        "ss_epoch": "1",
        "ss_seed": "0",
        "ss_optimizer": "adamw",
        "ss_unet_lr": "0.01",
        "ss_num_train_images": "14",
        "ss_total_batch_size": "4",
        "ss_resolution": "(32, 32)",
        "ss_mixed_precision": "no",
        "ss_network_module": "networks.lora",
        "ss_output_name": "adapter",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.prediction_type": "epsilon",
        "modelspec.author": "A. N.",
        "modelspec.license": "CC0-1.0",
        "modelspec.trigger_phrase": "qzx",
        "modelspec.hash_sha256": "0x" + entries["sshs_model_hash"],
    }
    assert {key: entries.get(key) for key in wanted} == wanted
    assert "ss_text_encoder_lr" not in entries and "modelspec.date" not in entries
    tags = json.loads(entries["ss_tag_frequency"])["source_0"]
    assert (tags["qzx"], tags["red"], tags["big"], tags["thing 3"]) == (7, 2, 1, 1)
    assert not any("sentence" in tag for tag in tags)
    recipe = json.loads(entries["lorakit.recipe"])
    assert (recipe["adapter.rank"], recipe["run.seed"], recipe["data.sources.0.repeats"]) == (2, 0, 2)
    assert not [key for key in recipe if "path" in key or "output" in key or key.startswith("sample")]
    assert json.loads(entries["lorakit.data"])["pictures"] == 7
    assert set(json.loads(entries["lorakit.base"])) == {"family", "unet", "text_encoder"}
    buckets = json.loads(entries["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == 7
    # of a checkpoint, of a run and through all formats
    _, earlier = open_adapter(run / "adapters" / "step-000002.safetensors")
    assert {key for key in entries if entries[key] != earlier.get(key)} == {
        "ss_steps", "ss_epoch", "ss_output_name", "modelspec.title",
        "sshs_model_hash", "modelspec.hash_sha256", "lorakit.digest",
    }  # fmt: skip
    for format, out in (("diffusers", "zebra.safetensors"), ("peft", "zebra"), ("kohya", "again.safetensors")):
        export_adapter(run, format=format, out=tmp_path / out)
        _, carried = open_adapter(tmp_path / out)
        own = {"ss_output_name", "modelspec.title", "sshs_model_hash", "modelspec.hash_sha256", "lorakit.digest"}
        assert {key: carried.get(key) for key in entries if key not in own} == {
            key: text for key, text in entries.items() if key not in own
        }
        assert carried["ss_output_name"] == carried["modelspec.title"] == out.removesuffix(".safetensors")
    again, _ = open_adapter(tmp_path / "again.safetensors")
    assert bytes(split_safetensors(dict(again))[1]) == bytes(split_safetensors(dict(tensors))[1])


def test_nothing_that_is_handed_on_names_anybody(run: Path, tmp_path: Path) -> None:
    export_adapter(run, format="peft", out=tmp_path / "peft")
    files = [run / "adapter.safetensors", *(run / "adapters").iterdir()]
    files += [path for path in (tmp_path / "peft").rglob("*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        content = file.read_bytes()
        assert [text for text in private(tmp_path) if text.encode() in content] == []


def test_a_step_and_a_checkpoint_mean_what_was_handed_out_then(run: Path, tmp_path: Path) -> None:
    from lorakit.core.errors import InputError

    by_step = export_adapter(run, step=2, out=tmp_path / "a.safetensors")
    by_path = export_adapter(run / "checkpoints" / "step-000002", out=tmp_path / "b" / "a.safetensors")
    by_file = export_adapter(run / "adapters" / "step-000002.safetensors", out=tmp_path / "c" / "a.safetensors")
    assert by_step.sha256 == by_path.sha256 == by_file.sha256
    assert by_step.sha256 != export_adapter(run, out=tmp_path / "d" / "a.safetensors").sha256
    with pytest.raises(InputError, match="no adapter at step 3; it has: 2, 4"):
        export_adapter(run, step=3, out=tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="is no run's folder"):
        export_adapter(run / "adapter.safetensors", step=2, out=tmp_path / "e.safetensors")


def test_a_title_may_change_when_a_run_goes_on(run: Path) -> None:
    from lorakit.verbs.train import resume

    resume(run, overrides=["run.about.title=Zorp", "run.steps=5"], allow=["run.steps"])
    assert open_adapter(run / "adapter.safetensors")[1]["modelspec.title"] == "Zorp"
