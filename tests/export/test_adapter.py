"""lorakit/export/adapter.py: from a run, a file in it, a file elsewhere or a state."""

import pytest
import torch

from lorakit.core.errors import InputError
from lorakit.export import export_adapter, read_adapter, write_adapter
from tests.export.tiny import family, made, same_state

STATE = dict(targets=("to_q",))


def test_from_a_run_from_a_file_in_it_and_from_a_state(tmp_path) -> None:
    state, run = made(**STATE), tmp_path / "run"
    step = run / "adapters" / "step-000002.safetensors"
    for path in (run / "adapter.safetensors", step):
        write_adapter(state, path, format="kohya", family=family(), dtype=torch.float16)
    (run / "recipe.toml").write_text(f'[model]\nfamily = "{family().name}"\npath = "{family().path}"\n')
    reports = [
        export_adapter(run, format="diffusers", out=tmp_path / "a.safetensors"),
        export_adapter(str(step), format="diffusers", out=str(tmp_path / "b.safetensors"), dtype=torch.float32),
        export_adapter(state, out=tmp_path / "c.safetensors", family=family()),
    ]
    assert [(r.format, r.dtype) for r in reports] == [("diffusers", "fp16"), ("diffusers", "fp32"), ("kohya", "fp32")]
    rounded = type(state)("lora", {k: t.half().float() for k, t in state.tensors.items()}, state.alphas)
    assert same_state(read_adapter(tmp_path / "a.safetensors", family=family()), rounded)
    assert same_state(read_adapter(tmp_path / "c.safetensors", family=family()), state)
    assert reports[0].to_json()["path"] == str(tmp_path / "a.safetensors")


def test_the_name_is_derived_where_none_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(made(**STATE), tmp_path / "zebra.safetensors", format="kohya", family=family())
    report = export_adapter("zebra.safetensors", format="peft", family=family())
    assert (tmp_path / report.path).is_dir()
    assert str(report.path) == "zebra-peft"
    with pytest.raises(InputError, match="exists already"):
        export_adapter("zebra.safetensors", format="peft", family=family())


def test_what_is_missing_is_asked_for(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(made(**STATE), path, format="kohya", family=family())
    with pytest.raises(InputError, match="--base"):
        export_adapter(path, out=tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="family="):
        export_adapter(made(**STATE), out=tmp_path / "b.safetensors")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text("nonsense")
    with pytest.raises(InputError, match="has not ended yet"):
        export_adapter(run, out=tmp_path / "b.safetensors")
    path.rename(run / "adapter.safetensors")
    with pytest.raises(InputError, match=r"\[model\] section cannot be read"):
        export_adapter(run, out=tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
