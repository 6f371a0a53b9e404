"""Where the data that ships with lorakit lies: in the installed package, or in the checkout."""

from pathlib import Path

from lorakit.core.errors import InputError

_PACKAGE = Path(__file__).parent.parent


def embedded(name: str) -> Path:
    """The folder `data/<name>` ("base", "mascot", "judge")."""
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / "data" / name):
        if folder.is_dir():
            return folder
    raise InputError(
        f"the embedded {name} is missing from this installation: install lorakit again from its repository"
    )
