"""`lorakit cache`: what it says, and which words do not go together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.core.files import size
from lorakit.recipe import Recipe
from tests.verbs.conftest import make_recipe  # noqa: F401, a fixture


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["cache", *words])
    return capsys.readouterr().out


def test_fill_look_and_prune(
    make_recipe: Callable[..., Recipe],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("run").to_toml())
    out = said(capsys, str(file), "data.sources.0.caption_dropout=0.5")
    assert out.splitlines() == [
        "pictures: 7 encoded, 0 were there",
        "captions: 8 encoded, 0 were there",
        f"The cache: {tmp_path / 'cache'}",
    ]
    assert "captions: 0 encoded, 7 were there" in said(capsys, str(file))
    assert "encoded in every step, for crops are random" in said(capsys, str(file), "data.sources.0.crop=random")
    entries, other = said(capsys, "--folder", str(tmp_path / "cache")).splitlines()
    memo = (tmp_path / "cache" / "scan.sqlite").stat().st_size
    assert "15 entries" in entries
    assert other == f"and {size(memo)} of copied tables and of what is remembered of pictures"
    folder = ["--folder", str(tmp_path / "cache")]
    assert "2 files unused for 0 days would be deleted" in said(
        capsys, "--prune", *folder, "--unused-for", "0", "--dry-run"
    )
    assert "2 files unused for 0 days deleted" in said(capsys, "--prune", *folder, "--unused-for", "0")
    assert "0 entries" in said(capsys, *folder)
    assert "0 files unused for 30 days deleted: 0 bytes" in said(capsys, "--prune", *folder)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["r.toml", "--prune"], ["--prune and a recipe"]),
        (["r.toml", "--folder", "x", "--dry-run"], ["--folder and a recipe", "--dry-run belongs to --prune"]),
        (["--unused-for", "3"], ["--unused-for belongs to --prune"]),
        (["--prune", "--unused-for", "-1"], ["a number of days"]),
        (["--prune", "--unused-for", "nan"], ["a number of days"]),
        (["--folder", "/no/such"], ["--folder /no/such does not exist"]),
        (["/no/such.toml"], ["/no/such.toml does not exist"]),
    ],
)
def test_words_that_do_not_go_together(words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cache", *words])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ")
    assert all(text in message for text in wanted) and len(message.splitlines()) == len(wanted)
