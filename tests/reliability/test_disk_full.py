"""A disk that fails at any operation of a save: what was there still loads, nothing half-written stays, and a later try
succeeds. First with faults that are made, one at each operation, then on a file system that is really full."""

import ctypes
import errno
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.errors import StorageError
from lorakit.training.folder import RunFolder
from tests.reliability import saves
from tests.reliability.operations import REMOVALS, Operations, in_child

SAVES = [name for name, (_, action) in saves.SCENES.items() if action is not saves.take]
_NEW_USER, _NEW_MOUNTS, _PRIVATE = 0x10000000, 0x20000, (1 << 18) | (1 << 14)  # of <sched.h> and <sys/mount.h>


WRITES = {"write", "open to write", "os.mkdir", "fsync"}  # what a full disk refuses


class Trial:
    """The action of a scene, tried on a fresh copy of the run's folder in `folder`."""

    def __init__(self, folder: Path, scene: str) -> None:
        steps, self.action = saves.SCENES[scene]
        self.template, self.run, done = folder / "before", folder / "run", folder / "done"
        saves.begin(self.template, steps)
        RunFolder.existing(self.template)  # the run is under way
        shutil.copytree(self.template, done)
        self.action(done)
        self.before, self.after = saves.whole(self.template), saves.whole(done)
        self.done = saves.tree(done)

    def refused(self, act: Callable[[], None]) -> bool:
        """Whether `act`, on the folder `run`, ended in a StorageError; asserts what must be true in either case."""
        message = ""
        try:
            act()
        except StorageError as error:
            message = str(error)
        found = saves.whole(self.run)
        assert found == self.after or (message and found == self.before)
        assert saves.metrics(self.run) in (saves.metrics(self.template), saves.metrics(self.template.parent / "done"))
        assert not message or str(self.run) in message
        return bool(message)

    def again(self) -> None:
        """The next try, on a disk that works, leaves no trace of the first."""
        RunFolder.existing(self.run)
        self.action(self.run)
        assert saves.tree(self.run) == self.done


def failing(folder: Path, scene: str, number: int, *, lasting: bool) -> None:
    """Has each operation of a scene fail with the error `number`, or all that write from one on; leaves the counts."""
    trial, operations, seen = Trial(folder, scene), Operations(), Counter[str]()
    while True:
        shutil.copytree(trial.template, trial.run)
        count, failed = 0, ""

        def fail(name: str, half: Callable[[], object]) -> None:
            nonlocal count, failed
            count += not lasting or name in WRITES
            if count > seen.total() and (not failed or (lasting and name in WRITES)):
                failed = failed or name
                half()
                raise OSError(number, os.strerror(number))

        def act() -> None:
            operations.act = fail
            try:
                trial.action(trial.run)
            finally:
                operations.act = None

        refused = trial.refused(act)
        if not failed:
            break
        if scene in SAVES:
            # what cannot be removed stays until the folder is taken again; a folder that is there need not be made
            assert refused or failed in {*REMOVALS, "open", "os.mkdir"}, failed
            assert not refused or saves.litter(trial.run) == [], failed
        trial.again()
        shutil.rmtree(trial.run)
        seen[failed] += 1
    (folder / "seen.json").write_text(json.dumps(seen))


@pytest.mark.parametrize("scene", SAVES)
@pytest.mark.parametrize(
    ("number", "lasting"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, False), (errno.ENOSPC, True)]
)
def test_a_fault_at_any_operation_of_a_save_harms_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None], scene: str, number: int, lasting: bool
) -> None:
    assert in_child(lambda: failing(tmp_path, scene, number, lasting=lasting)) == 0, "see its output"
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["write"] >= 7 and seen["open to write"] >= 7 and seen["fsync"] >= 13 and seen["os.mkdir"] >= 4
    assert lasting or (seen["os.rename"] >= 5 and sum(seen.values()) >= 55)
    record_property("trials", sum(seen.values()))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_nor_does_a_fault_at_any_operation_of_a_resume(
    tmp_path: Path, record_property: Callable[[str, object], None], number: int
) -> None:
    assert in_child(lambda: failing(tmp_path, "a resume", number, lasting=False)) == 0, "see its output"
    trials = sum(json.loads((tmp_path / "seen.json").read_text()).values())
    assert trials >= 30
    record_property("trials", trials)


# -- the system's own errors ---------------------------------------------------------------------------------------


def limited(folder: Path, scene: str) -> None:
    """No file may be larger than so many bytes: EFBIG, after a part of the file was written."""
    trial, refused = Trial(folder, scene), 0
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, 10_000, 20):
        shutil.copytree(trial.template, trial.run)

        def act() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # noqa: B023 - called at once
            try:
                trial.action(trial.run)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        if not trial.refused(act):
            break
        assert saves.litter(trial.run) == []
        refused += 1
        trial.again()
        shutil.rmtree(trial.run)
    (folder / "refused").write_text(str(refused))


@pytest.mark.parametrize("scene", SAVES)
def test_files_that_may_not_grow(tmp_path: Path, record_property: Callable[[str, object], None], scene: str) -> None:
    assert in_child(lambda: limited(tmp_path, scene)) == 0, "see its output"
    refused = int((tmp_path / "refused").read_text())
    assert refused > 10
    record_property("trials", refused)


def own_disk(folder: Path, options: str) -> bool:
    """Whether a small file system could be mounted on `folder`, for this process alone."""
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_MOUNTS) and libc.unshare(_NEW_USER | _NEW_MOUNTS):
        return False
    return not (
        libc.mount(None, b"/", None, _PRIVATE, None)
        or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode())
    )


def filled(folder: Path, scene: str, resource_name: str) -> None:
    """A disk with room for so many pages, or so many files, and no more, until there is enough."""
    disk, refused = folder / "disk", 0
    disk.mkdir()
    if not own_disk(disk, "size=2m,nr_inodes=400"):
        (folder / "refused").write_text("-1")
        return
    trial, filler = Trial(disk, scene), disk / "filler"
    for room in range(200):
        shutil.copytree(trial.template, trial.run)
        filler.mkdir()
        take = fill_pages if resource_name == "pages" else fill_inodes
        take(filler, room)
        if not trial.refused(lambda: trial.action(trial.run)):
            break
        assert saves.litter(trial.run) == []
        refused += 1
        shutil.rmtree(filler)
        trial.again()
        shutil.rmtree(trial.run)
    (folder / "refused").write_text(str(refused))


def fill_pages(filler: Path, room: int) -> None:
    about = os.statvfs(filler)
    with open(filler / "f", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, (about.f_bavail - room) * about.f_frsize)


def fill_inodes(filler: Path, room: int) -> None:
    for number in range(os.statvfs(filler).f_favail - room):
        (filler / str(number)).touch()


@pytest.mark.parametrize("scene", SAVES)
@pytest.mark.parametrize("resource_name", ["pages", "inodes"])
def test_a_disk_that_is_really_full(
    tmp_path: Path, record_property: Callable[[str, object], None], scene: str, resource_name: str
) -> None:
    assert in_child(lambda: filled(tmp_path, scene, resource_name)) == 0, "see its output"
    refused = int((tmp_path / "refused").read_text())
    if refused < 0:
        pytest.skip("needs a file system of its own: root, or user namespaces")
    assert refused >= 5
    record_property("trials", refused)
