"""Scans for tests: of folders, with a cache that is nobody's."""

import tempfile
from pathlib import Path

from lorakit.data.scan import Scan, scan
from lorakit.data.sources import SourceSettings


def scanned(*paths: Path | str, cache: Path | None = None, skip: str = "error", **settings: object) -> Scan:
    """The scan of a source at each path, all with `settings`."""
    sources = [SourceSettings(path=str(path), **settings) for path in paths]
    if cache is not None:
        return scan(sources, cache=cache, on_bad_image=skip)
    with tempfile.TemporaryDirectory() as folder:
        return scan(sources, cache=Path(folder), on_bad_image=skip)


def good(*paths: Path | str, **settings: object) -> Scan:
    """The same, where nothing may be wrong."""
    found = scanned(*paths, **settings)
    assert not found.problems, found.problems
    return found


def problems_of(*paths: Path | str, **settings: object) -> tuple[str, ...]:
    """What is wrong, and that something is."""
    problems = scanned(*paths, **settings).problems
    assert problems
    return problems
