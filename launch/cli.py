"""The `t5pegasus` command: a table of verbs in the order of the flow, each imported when it is chosen."""

import contextlib
import difflib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from launch.exit_codes import Terminated, exit_code
from launch.processes import is_one_of_several, leave_at_once
from t5pegasus import __doc__ as PROJECT_IN_ONE_SENTENCE
from t5pegasus import __version__
from t5pegasus.errors import PreemptedError, T5PegasusError, UsageError

_FREE_SPACE = "free some space or choose another disk, then give the same command again"
_MAY_WRITE = "choose a folder you may write to, or change its permissions"
_WAYS_OUT = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EACCES: _MAY_WRITE,
    errno.EPERM: _MAY_WRITE,
    errno.EROFS: _MAY_WRITE,
    errno.ENOTDIR: "a part of this path is a file; choose another path, or move that file away",
}


class Verb(NamedTuple):
    """One stage of the flow as a command."""

    summary: str
    parallel: bool = False
    """Whether several processes can run it together."""
    saves: bool = False
    """Whether it answers SIGTERM by saving what it has done, with exit code 42."""

    @staticmethod
    def module(name: str) -> str:
        """The module whose `main(argv)` runs the verb `name`."""
        return f"launch.verbs.{name.replace('-', '_')}"


VERBS = {
    "tokenizer": Verb("train a tokenizer on documents; encode and decode text with it"),
    "build": Verb("clean and deduplicate documents and turn them into training examples"),
    "pseudo-summary": Verb("show the sentences that become the target of each document"),
    "plan": Verb("memory, collectives and predicted speed of a run on hardware that is not here"),
    "pretrain": Verb("train a model on the examples, or continue a run that was stopped", parallel=True, saves=True),
    "grow": Verb("turn a checkpoint into a larger one that computes the same", parallel=True),
    "finetune": Verb("train a checkpoint on pairs of text and summary", parallel=True, saves=True),
    "few-shot": Verb("fine-tune on 10, 100, 1,000 pairs under several seeds, as a table"),
    "summarize": Verb("write summaries of documents"),
    "evaluate": Verb("held-out loss, ROUGE and BLEU of a checkpoint or of given summaries"),
    "checkpoint": Verb("verify, list and compare checkpoints"),
    "convert": Verb("exchange checkpoints with other formats"),
    "report": Verb("one self-contained HTML page about a run"),
    "quickstart": Verb("the whole flow on the embedded sample, in minutes on a CPU"),
    "launch": Verb("run a verb as several processes here, or on Cloud TPU VMs"),
}
"""Every verb, in the order in which a user meets them."""


def find_verb(name: str) -> Verb:
    """The verb called `name`.

    Raises:
        UsageError: no verb has this name; the nearest one is named.
    """
    if name in VERBS:
        return VERBS[name]
    near = difflib.get_close_matches(name, VERBS, n=1)
    way_out = f"perhaps you meant {near[0]!r}" if near else "`t5pegasus --help` lists them"
    raise UsageError(f"unknown verb {name!r}; {way_out}")


def format_help() -> str:
    """The text of `t5pegasus --help`."""
    width = max(map(len, VERBS))
    flow = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"{PROJECT_IN_ONE_SENTENCE}\n\n"
        "usage: t5pegasus VERB [arguments]     t5pegasus VERB --help     t5pegasus --version\n\n"
        f"The verbs, in the order of the flow:\n{flow}\n\n"
        "Start with `t5pegasus quickstart`.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code of the process.

    The codes are those of `launch.exit_codes`. In a job of several processes a failing one ends at once, without the
    clean-up in which JAX would wait for peers that are themselves waiting for it.
    """
    code = _run(sys.argv[1:] if argv is None else argv)
    if code != 0 and is_one_of_several():
        leave_at_once(code)
    return code


def _run(argv: list[str]) -> int:
    """Run `argv` and report whatever goes wrong as text on stderr and an exit code."""
    speaker = f"t5pegasus {argv[0]}" if argv and argv[0] in VERBS else "t5pegasus"
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # while a full disk, or a reader that has gone, can still be reported
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return _report(error, speaker)
    return code


def _dispatch(argv: list[str]) -> int:
    match argv:
        case []:
            print(format_help(), end="", file=sys.stderr)
            return UsageError.exit_code
        case ["--help" | "-h", *_]:
            print(format_help(), end="")
            return 0
        case ["--version", *_]:
            print(f"t5pegasus {__version__}")
            return 0
    name, *arguments = argv
    verb = find_verb(name)
    _log_to_stderr()
    try:
        with _termination_as_interrupt():
            return importlib.import_module(Verb.module(name)).main(arguments) or 0
    except Terminated:
        if verb.saves:  # it had not come to where it listens itself
            raise PreemptedError("terminated before it had begun; the same command goes on") from None
        raise


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for ours in ("t5pegasus", "growth"):
        logging.getLogger(ours).setLevel(logging.INFO)  # e.g. that a run is finished; of others, warnings only


def _report(error: BaseException, speaker: str) -> int:
    match error:
        case SystemExit():  # argument parsers end this way, after they have printed their own message
            message = error.code if isinstance(error.code, str) else None
        case T5PegasusError():
            message = f"{speaker}: {error}"
        case Terminated():
            message = f"{speaker}: terminated; give the same command again to go on"
        case KeyboardInterrupt():
            message = f"{speaker}: interrupted; give the same command again to go on"
        case BrokenPipeError():
            # The reader (`head`) has seen enough; Python would complain when it flushes stdout once more at
            # exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message = None
        case OSError():
            message = f"{speaker}: {_describe(error)}"
        case _:
            message = "".join(traceback.format_exception(error)).rstrip()
    if message:
        try:
            print(message, file=sys.stderr)
        except OSError:  # nobody can be told; what stays in the buffer must not change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return exit_code(error)


def _describe(error: OSError) -> str:
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _WAYS_OUT:
        reason += f"; {_WAYS_OUT[error.errno]}"
    return f"{' -> '.join(paths)}: {reason}" if paths else reason


if __name__ == "__main__":
    raise SystemExit(main())
