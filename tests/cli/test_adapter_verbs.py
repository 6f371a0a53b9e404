"""lorakit/cli/export.py, merge.py, inspect.py: what is typed arrives, and every wrong input is one message."""

import json
import re
from pathlib import Path

import pytest
import torch

from lorakit.cli.main import main
from lorakit.cli.merge import adapter_of
from lorakit.core.errors import InputError
from lorakit.export import inspect_adapter, read_adapter, write_adapter
from lorakit.export.weights import Weights
from tests.export.tiny import family, made


def test_a_weight_is_what_parses_as_a_number_after_the_last_colon() -> None:
    cases = {
        "a.safetensors": ("a.safetensors", 1.0),
        "a.safetensors:0.8": ("a.safetensors", 0.8),
        "a:-1e-1": ("a", -0.1),
        r"C:\x\a.safetensors": (r"C:\x\a.safetensors", 1.0),
        r"C:\x\a.safetensors:2": (r"C:\x\a.safetensors", 2.0),
        "dir:b/a.safetensors": ("dir:b/a.safetensors", 1.0),
        "a:": ("a:", 1.0),
    }
    assert {text: adapter_of(text) for text in cases} == {t: (Path(name), Weights(w)) for t, (name, w) in cases.items()}
    assert adapter_of("a:0.5,unet=2") == (Path("a"), Weights(0.5, {"unet": 2.0}))
    for text in ("a:nan", "a:inf"):
        with pytest.raises(InputError, match="finite"):
            adapter_of(text)


def test_export_inspect_and_merge_from_the_command_line(tmp_path, capsys) -> None:
    source, base = tmp_path / "zebra.safetensors", str(family().path)
    write_adapter(made(targets=("to_q",)), source, format="kohya", family=family())
    out = tmp_path / "out.safetensors"
    main(["export", str(source), "--base", base, "--format", "diffusers", "--dtype", "fp16", "--out", str(out)])
    assert "stock pipeline" in capsys.readouterr().out
    main(["inspect", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["dtype"], found["modules"]) == ("diffusers", "fp16", inspect_adapter(source).modules)
    main(["inspect", str(source)])
    text = capsys.readouterr().out
    assert "lora_unet: " in text
    assert "rank 4, alpha 4" in text
    again = tmp_path / "again.safetensors"
    main(["convert", str(out), "--base", base, "--to", "kohya", "--dtype", "fp32", "--out", str(again), "--title", "Z"])
    capsys.readouterr()
    main(["inspect", str(again), "--out", str(tmp_path / "norms.png")])
    text = capsys.readouterr().out
    assert "digest verified" in text and "modelspec.title = Z" in text and "ss_output_name = Z" in text
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    for more in ([], ["--base", base]):
        main(["inspect", "--diff", str(out), str(again), *more])
        text = capsys.readouterr().out
        layers = inspect_adapter(source).modules
        assert text.splitlines() == [
            f"{layers} layers in both, {layers} of them equal",
            "the adapters are the same: each layer adds the same to the weights",
        ]
    main(
        [
            "merge",
            base,
            f"{source}:0.5,text_encoder=0",
            str(out),
            "--no-verify",
            "--max-shard-size",
            "1MB",
            "--out",
            str(tmp_path / "merged"),
        ]
    )
    assert (tmp_path / "merged" / "model_index.json").is_file()
    capsys.readouterr()
    main(["merge", base, f"{source}:0", "--no-verify", "--out", str(tmp_path / "as it was")])
    assert ": 0 layers changed" in capsys.readouterr().out


def test_a_run_stands_for_its_adapter(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").touch()
    with pytest.raises(InputError, match="the run has not ended yet"):
        adapter_of(f"{run}:0.5")
    file = run / "adapter.safetensors"
    write_adapter(made(targets=("to_q",)), file, format="kohya", family=family())
    assert adapter_of(f"{run}:0.5") == (file, Weights(0.5)) and adapter_of(str(run)) == (file, Weights())
    main(["inspect", str(run)])
    assert capsys.readouterr().out.startswith(f"{file}: kohya format")
    main(["inspect", "--diff", str(run), str(file)])
    assert "the adapters are the same" in capsys.readouterr().out


def test_an_alpha_that_is_not_assumed_is_told_of(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(made(), file, format="kohya", family=family())
    read_adapter(file, family=family(), assume_alpha=1.0)
    assert caplog.messages == [f"{file} says all its alphas: none is assumed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{file}", "--out", "{there}"], "--out .* exists already"),
        (["export", "{file}", "--out", "{new}"], "--base"),
        (["export", "{file}", "--out", "{new}", "--family", "x"], "give --base too"),
        (["export", "{missing}", "--out", "{new}"], "no such adapter file"),
        (["export", "{file}", "--base", "{base}", "--family", "sdd", "--out", "{new}"], "Did you mean sd"),
        (["export", "{file}", "--base", "{base}", "--out", "{folder}"], "--out .*/new: a file's name ends in .safet"),
        (["export", "{file}", "--format", "peft", "--out", "{new}"], "--out .* is a folder: leave .safetensors out"),
        (["merge", "{base}", "{file}", "--out", "{there}"], "--out .* exists already"),
        (["merge", "{base}", "{file}", "--out", "{new}"], "--out .*: of a base in a folder a folder is made"),
        (["merge", "{base}", "{file}", "--out", "{folder}", "--max-shard-size", "1"], "write a size like 500MB"),
        (["merge", "{base}", "{missing}:0.5", "--out", "{folder}"], "no such adapter file"),
        (["merge", "{base}", "{file}:0.5,unett=1", "--out", "{folder}"], "weight unett = 1.* Did you mean unet"),
        (["merge", "{base}", "{file}:x", "--out", "{folder}"], "the weight 'x' is no number"),
        (["merge", "{base}", "{file}", "--out", "{new}", "--max-shard-size", "big"], "write a size like 500MB"),
        (["convert", "{file}", "--to", "peft", "--out", "{folder}"], "--base"),
        (["export", "{file}", "--step", "3", "--out", "{new}"], "no run's folder"),
        (["export", "{file}", "--base", "{base}", "--thumbnail", "{there}", "--out", "{new}"], "no picture"),
        (["inspect", "{missing}"], "no such adapter file"),
        (["inspect", "recipe.toml"], "is a recipe: say --timesteps"),
        (["inspect"], "give one FILE, or --diff"),
        (["inspect", "{file}", "--out", "{new}"], "is a PNG"),
        (["inspect", "{file}", "x.y=1"], "goes with --timesteps"),
        (["inspect", "{file}", "--base", "{base}"], "--base goes with --diff"),
        (["inspect", "--diff", "{file}", "{missing}"], "no such adapter file"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(tmp_path, capsys, arguments: list[str], said: str) -> None:
    file, there = tmp_path / "a.safetensors", tmp_path / "there.safetensors"
    write_adapter(made(targets=("to_q",)), file, format="kohya", family=family(), dtype=torch.float16)
    there.touch()
    names = {"file": file, "there": there, "missing": tmp_path / "no.safetensors", "base": family().path}
    names |= {"new": tmp_path / "new.safetensors", "folder": tmp_path / "new"}
    with pytest.raises(SystemExit) as exit_:
        main([argument.format(**names) for argument in arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(said, error), error
    assert not names["new"].exists() and not names["folder"].exists()
