"""The command line itself: light, and every error a message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.cli import main as cli
from lorakit.core.errors import DivergedError, InputError, LorakitError, StorageError
from lorakit.core.processes import barrier, rank, world
from lorakit.training.processes import Runtime
from tests.verbs.conftest import in_processes


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_help_is_answered_without_heavy_imports_and_within_a_third_of_a_second_of_cpu() -> None:
    code = (
        "import sys, time; from lorakit.cli.main import parser; parser().format_help(); parser().parse_args(['merge', "
        "'a', 'b', '--out', 'c']); print(time.process_time()); print(*sys.modules)"
    )
    spent, modules = python(code).split("\n", 1)
    loaded = set(modules.split())
    assert not loaded & {"torch", "numpy", "PIL", "diffusers", "transformers", "peft", "accelerate", "rich"}
    assert float(spent) <= 0.3


def test_importing_lorakit_is_light_and_its_names_are_there() -> None:
    code = (
        "import sys, lorakit; assert 'torch' not in sys.modules; "
        "print(callable(lorakit.train), callable(lorakit.load_recipe), callable(lorakit.export_adapter), "
        "callable(lorakit.merge_adapter), lorakit.diffusion.GaussianDiffusion(timesteps=10).timesteps)"
    )
    assert python(code).split() == ["True", "True", "True", "True", "10"]


def test_overrides_may_stand_between_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("lorakit.cli.train.run", seen.append)
    cli.main(["train", "--resume", "r", "--allow-change", "a.b", "a.b=1", "--allow-change", "c.d", "c.d=2"])
    args = seen[0]
    assert [args.recipe, *args.overrides] == ["a.b=1", "c.d=2"] and args.allow_change == ["a.b", "c.d"]
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "r.toml", "--nosuch"])
    assert caught.value.code == 2


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0 and "usage: lorakit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError(["a", "b\x1b"]), 2), (DivergedError("d"), 3), (StorageError("s"), 4), (PermissionError(13, "no"), 4)],
)
def test_errors_become_one_message_and_an_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> None:
        raise error

    monkeypatch.setattr("lorakit.cli.train.run", run)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "x"])
    message = capsys.readouterr().err
    assert caught.value.code == code
    assert message.startswith("error: ") and "\x1b" not in message
    if isinstance(error, LorakitError):
        assert all(part[0] in message for part in str(error).splitlines())


def test_an_unknown_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lorakit.cli.train.run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "x"])


def test_what_several_processes_cannot_share_is_refused_to_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "nothing.safetensors"])
    assert end.value.code == 2 and "without a launcher" in capsys.readouterr().err


def test_what_each_of_several_processes_meets_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(args: object) -> None:
        Runtime("fp32", folder=tmp_path)
        barrier()
        time.sleep(1 if rank() == 0 else 0)  # whoever comes first says it
        raise InputError(f"met by all of {world()}")

    monkeypatch.setattr("lorakit.cli.train.run", run)
    assert in_processes(2, lambda: cli.main(["train", "x"])) == [2, 2]
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("CPU threads: ")] == ["error: met by all of 2"]
