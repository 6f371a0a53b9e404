"""Where a run's numbers go besides metrics.jsonl: wandb and tensorboard, through Accelerate's classes for them.

They are other people's programs and other people's servers: whatever one of them does, the run goes on and trains the
same numbers. So all of it happens in a thread of its own, and what fails is one warning. Keys come from the environment
or from where the tracker's own login put them; nothing here reads or writes one.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit.core.errors import InputError
from lorakit.core.files import printable

log = logging.getLogger("lorakit")

PATIENCE = 20.0
"""Seconds for a tracker to send what it still has when a run ends; a signalled run has to be gone in 30."""
_WAITING = 10_000  # records, some MB: a tracker that is so far behind is not going to come back


def refuse_missing(names: Sequence[str]) -> None:
    """Raises InputError naming the trackers whose library is not installed."""
    # a folder of that name, such as the one that wandb writes, is a package without an origin
    missing = [name for name in names if getattr(find_spec(name), "origin", None) is None]
    if missing:
        raise InputError(
            [
                f'run.trackers: {name} is not installed: pip install "lorakit[{name}]", or leave it out.'
                for name in missing
            ]
        )


class Trackers:
    """The trackers `names` of the run in `folder`, whose settings are `config`. They start with the first record."""

    def __init__(self, names: Sequence[str], *, folder: Path, config: Mapping[str, Any]) -> None:
        self._names, self._folder, self._config = names, folder, config
        self._records: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost = False

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands on the numbers of a metrics record; costs microseconds, and never raises or waits."""
        if self._lost:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()
        if self._records.qsize() >= _WAITING:
            self._lost = True
            log.warning("run.trackers: they do not keep up with the run, which goes on without them")
        else:
            self._records.put(record)

    def end(self) -> None:
        """Lets them send what they have, for PATIENCE seconds at most."""
        thread, self._thread = self._thread, None
        if thread is None or self._lost:
            return
        self._records.put(None)
        thread.join(PATIENCE)
        if thread.is_alive():
            log.warning("run.trackers: they have not finished in %g seconds and are left behind", PATIENCE)

    def _work(self) -> None:
        """The thread: what a tracker raises ends that tracker only."""
        running: dict[str, Any] = {}
        first = self._records.get()
        if first is None:
            return
        for name in self._names:
            with _warned(name, running):
                running[name] = _started(name, self._folder, self._config, first_step=first["step"])
        record: Mapping[str, Any] | None = first
        while record is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, float)}
            for name, tracker in list(running.items()):
                with _warned(name, running):
                    tracker.log(numbers, step=record["step"])
            record = self._records.get()
        for name, tracker in list(running.items()):
            with _warned(name, running):
                tracker.finish()


@contextlib.contextmanager
def _warned(name: str, running: dict[str, Any]) -> Iterator[None]:
    """Turns what the tracker `name` raises into a warning, and takes it out of `running`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        running.pop(name, None)
        log.warning(
            "run.trackers: %s failed (%s: %s); the run goes on without it",
            name,
            type(error).__name__,
            printable(error),
        )


def _started(name: str, folder: Path, config: Mapping[str, Any], *, first_step: int) -> Any:
    """Accelerate's tracker `name`, begun: it writes below `folder`."""
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    tracker: Any
    if name == "tensorboard":
        # a resumed run's curve goes over what an earlier one logged past its checkpoint
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=first_step)
    else:
        tracker = WandBTracker(os.environ.get("WANDB_PROJECT", "lorakit"), dir=folder, **_wandb_settings(folder))
    with _no_keyboard():
        tracker.start()
    tracker.store_init_configuration(dict(flat(config)))
    if name == "wandb":
        offline = f"offline, below {printable(folder / 'wandb')}: send it by `wandb sync`"
        log.info("wandb: %s", offline if tracker.run.offline else tracker.run.url or "disabled")
    return tracker


def _wandb_settings(folder: Path) -> dict[str, Any]:
    import wandb

    return {
        "name": folder.name,
        "settings": wandb.Settings(
            silent=True,
            console="off",  # what is printed names files and folders of this machine
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,  # host and user name, command line
            x_disable_machine_info=True,
            x_save_requirements=False,
            finish_timeout=PATIENCE / 2,
        ),
    }


@contextlib.contextmanager
def _no_keyboard() -> Iterator[None]:
    """Within it nobody is at the terminal: a login that would ask for a key fails at once instead."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin


def flat(config: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Nested settings as dotted keys with plain values, as trackers take them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{start}{key}.")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            yield from flat({str(i): entry for i, entry in enumerate(value)}, f"{start}{key}.")
        else:
            yield f"{start}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
