"""The `t5pegasus` command with a fault in it.

    FAULT=kill@step:5@1 python benchmarks/with_fault.py pretrain …
    FAULT=KIND@PLACE[@PROCESS][;…]

KIND   kill     SIGKILL to itself                     term, term-twice   SIGTERM, from a thread
       stop     SIGSTOP                               raise              an exception
       sleep    for an hour, in Python                block              the same, in C
       hold     the same, holding Python's lock       slow               half a second
       full     from here on the disk under RUN/checkpoints is full
       small    from here on no file may grow beyond 20 kB
       lag      from here on each change under RUN/checkpoints takes 0.05 s
       nan      the loss of the batch with this row is no number
       flags    another learning rate than the other processes
       apart    another working folder than the other processes
PLACE  restore, compile, data:5, step:5, device:5, evaluate:5, save:5, event:5
                           as the run enters this activity for the first time, or at this step
       save+0.2:5          the same, and 0.2 s later, in a thread
       step:*              each time
       import, after+3     while Python starts, or so many seconds later
       write:7             at the 7th change in RUN/checkpoints: files opened to write, folders made, names changed
       row:100             the row of the stream that nan is about
PROCESS  its number; all of them where none is given

LEDGER=folder keeps a record of what the run trained on: a line per update and process, with the numbers of the rows on
this process's devices and a checksum of their tokens.
"""

import ctypes
import errno
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

PROCESS = os.environ.get("JAX_PROCESS_ID", "0")
PLACE = re.compile(r"(?P<name>[a-z]+)(?:\+(?P<later>[0-9.]+))?(?::(?P<step>\d+|\*))?")
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class InjectedError(Exception):
    """What `raise` raises."""


def injure(kind: str) -> None:  # noqa: PLR0912 - a case per kind
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term" | "term-twice":
            send = threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM))
            send.start()
            if kind == "term-twice":
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise InjectedError(f"injected into process {PROCESS}")
        case "sleep":
            time.sleep(3600)
        case "block":
            ctypes.CDLL(None).sleep(3600)
        case "hold":
            ctypes.PyDLL(None).sleep(3600)
        case "slow":
            time.sleep(0.5)
        case "full":
            hear_writes(refuse)
        case "lag":
            hear_writes(lambda _: time.sleep(0.05))
        case "flags":
            sys.argv += ["--optimizer.learning-rate", "0.5"]
        case "apart":
            os.chdir(tempfile.mkdtemp())
        case "small":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        case _:
            raise ValueError(f"no such fault: {kind}")


def arm(kind: str, place: re.Match[str]) -> None:
    name, step = place["name"], place["step"]
    later = float(place["later"] or 0.0)

    def strike() -> None:
        print(f"fault: {kind} at {place[0]} in process {PROCESS}", file=sys.stderr, flush=True)
        if later:
            threading.Timer(later, injure, (kind,)).start()
        else:
            injure(kind)

    match name:
        case "import" | "after":
            strike()
        case "write":
            count_writes(int(step), strike)
        case "row":
            spoil(int(step))
        case _:
            watch_activities(name, step, strike)


def watch_activities(name: str, step: str | None, strike: Callable[[], None]) -> None:
    from t5pegasus.train.control import Control

    turn, struck = Control._turn_to, []

    def turn_to(self: Control, to: str, at: int) -> None:
        is_entered = self.activity.name != to
        turn(self, to, at)
        if to == name and is_entered and (step == "*" or (step in (None, str(at)) and not struck)):
            struck.append(at)
            strike()

    Control._turn_to = turn_to  # pyright: ignore[reportAttributeAccessIssue]


def count_writes(number: int, strike: Callable[[], None]) -> None:
    count = 0

    def hear(path: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            strike()

    hear_writes(hear)


def spoil(row: int) -> None:
    """Let the loss of each batch with this row be no number, where the row's process gives it to its devices."""
    import numpy as np

    from t5pegasus.train import run

    place = run.place_batch

    def spoilt(batch: Any, *args: Any) -> Any:
        if row in np.asarray(batch.row_ids):
            batch = batch._replace(decoder_loss_weights=batch.decoder_loss_weights * np.float32("nan"))
        return place(batch, *args)

    run.place_batch = spoilt


def refuse(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def hear_writes(act: Callable[[str], None]) -> None:
    """Call `act` before each change below RUN/checkpoints, with what is to be changed."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if is_write and "/checkpoints/" in str(arguments[0]):
            act(str(arguments[0]))

    sys.addaudithook(hear)


def keep_ledger(folder: Path) -> None:
    """Write down what each update is given, as the loop is given it."""
    import numpy as np

    from t5pegasus.train import loop

    run = loop.run

    def noted(step: int, batches: Iterator[Any], file: IO[str]) -> Iterator[Any]:
        for number, batch in enumerate(batches, start=step):
            rows = {}
            for shards in zip(*(each.addressable_shards for each in batch_fields(batch))):
                for row, *tokens in zip(*(np.asarray(each.data) for each in shards)):
                    rows[int(row)] = zlib.crc32(b"".join(each.tobytes() for each in tokens))
            file.write(f"{number} {' '.join(f'{row}:{rows[row]:08x}' for row in sorted(rows))}\n")
            file.flush()
            yield batch

    def batch_fields(batch: Any) -> tuple[Any, Any, Any]:
        return batch.row_ids, batch.encoder_input_tokens, batch.decoder_target_tokens

    def noted_run(state: Any, train_step: Any, batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        with (folder / f"{time.time_ns():020d}-{PROCESS}.txt").open("w") as file:
            return run(state, train_step, noted(int(state.step), batches, file), *args, **kwargs)

    loop.run = noted_run


def main() -> int:
    for fault in filter(None, os.environ.get("FAULT", "").split(";")):
        kind, where, *whose = fault.split("@")
        place = PLACE.fullmatch(where)
        if place is None:
            raise ValueError(f"no such place: {where}")
        if whose in ([], [PROCESS]):
            arm(kind, place)
    if ledger := os.environ.get("LEDGER"):
        keep_ledger(Path(ledger))
    from launch.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
