"""Signals to a process whose main thread may be deep in a library: a thread of its own hears them at once.

Python runs its signal handlers in the main thread, between two of its own instructions: during a compilation or in a
collective that waits for another process that may be never. The number of a signal is therefore also written to a
pipe, by the interpreter's handler in C, and a thread that waits there acts on it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_HEARD_ONLY_HERE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SIGINT also raises KeyboardInterrupt, as usual."""


@contextlib.contextmanager
def hear_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of each SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 inside, in a thread of its own.

    Outside of the main thread, where Python allows no handlers, nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_listen, args=(reader, act), name="signals", daemon=True)
    thread.start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in _HEARD_ONLY_HERE}
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # the thread reads the end
        thread.join()
        os.close(reader)


def is_heard() -> bool:
    """Whether SIGTERM is heard here: then nothing else may take it."""
    return any(thread.name == "signals" for thread in threading.enumerate())


def _listen(reader: int, act: Callable[[int], None]) -> None:
    wanted = {*_HEARD_ONLY_HERE, signal.SIGINT}
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in wanted:
                act(number)
