"""The command line: finds the verb, calls it, and turns errors into one message and an exit code.

Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

import argparse
import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import time

from lorakit.core.errors import InputError, InterruptedRun, LorakitError, LostProcess, StorageError
from lorakit.core.files import printable
from lorakit.core.start import collect_rarely, import_later, list_models_once
from lorakit.core.threads import let_waiting_sleep

SHARED = ("caption", "cache", "train", "sample")  # what several processes do together
_TELLING = 10.0  # seconds that a process waits for the first one to have told an error
VERBS = ("demo", "check", "caption", "captions", "cache", "train", "sample", "export", "convert", "merge", "inspect")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lorakit", description="Teach a latent diffusion model something new.")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"lorakit.cli.{name}")
        sub = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb and ends the process with the exit code of the contract."""
    let_waiting_sleep()
    collect_rarely()
    import_later("bitsandbytes")  # with it comes torch's compiler, a second in all
    list_models_once()
    try:
        _main(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


def _main(arguments: list[str] | None) -> None:
    top = parser()
    args, rest = top.parse_known_args(arguments)
    # argparse takes the words of a list in one place only; overrides may stand between options
    if rest and hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest):
        args.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(map(printable, rest))}")
    logger = logging.getLogger("lorakit")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler()]  # anew: it keeps the stderr that it finds
    try:
        if args.verb not in SHARED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"`lorakit {args.verb}` is the work of one process: start it without a launcher.")
        args.run(args)
    except LorakitError as error:
        _tell(error)
        # a signal may have left a pool with a thread that nobody knows; a lost process, gloo with one that aborts
        if isinstance(error, InterruptedRun | LostProcess):
            from lorakit.core.processes import end_now

            end_now(error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # whoever read our output has gone; Python would complain once more when it flushes at exit
        with contextlib.suppress(OSError):
            sys.stdout.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        report(
            StorageError(f"{error.filename or 'a file'}: {error.strerror}: free some space or choose another folder")
        )
        sys.exit(StorageError.exit_code)


def _tell(error: LorakitError) -> None:
    """Reports what this process of a launch has met, if no other does or has: a launcher ends all as soon as one has
    ended, in the middle of a word, so those that are silent wait until it was said."""
    first = os.environ.get("RANK", "0") == "0"
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if first:
            report(error)
        else:  # all do the same before they have found each other; the launcher ends this sleep
            time.sleep(_TELLING)
        return
    from lorakit.core.processes import first_to_say, meet

    if error.everywhere and not first and meet(_TELLING):
        return  # the first has told it
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that has seen another end
    ours = first_to_say("lost" if isinstance(error, LostProcess) else str(error))
    if ours:
        report(error)
    signal.signal(signal.SIGTERM, before)
    if error.everywhere and first:
        meet(_TELLING)
    elif not ours:
        time.sleep(1)


def report(error: LorakitError) -> None:
    """One `error: …` on stderr, a line per problem, control characters escaped."""
    lines = [printable(line) for line in str(error).splitlines()] or [type(error).__name__]
    print("error: " + "\n       ".join(lines), file=sys.stderr)
