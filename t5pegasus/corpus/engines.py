"""Running tasks on all cores, in bounded memory, so that nothing outlives the build that started it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from t5pegasus.errors import T5PegasusError

Task = TypeVar("Task")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    make_function: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task], num_workers: int
) -> Iterator[Result]:
    """Results of the tasks, in the order in which they finish.

    Args:
        make_function: called once in each worker, e.g. to load a tokenizer, gives the function to run;
            must be picklable.
        tasks: taken from only as fast as they are worked on, two per worker ahead.
        num_workers: processes; 1 works in this process.

    Raises:
        T5PegasusError: if a worker was killed; or what a task raised.
    """
    if num_workers == 1:
        yield from map(make_function(), tasks)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can deadlock
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(make_function,))
    try:
        waiting: set[Future[Result]] = set()
        for task in tasks:
            waiting.add(pool.submit(_run, task))
            if len(waiting) >= 2 * num_workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise T5PegasusError(
            f"one of the {num_workers} worker processes ended early, most likely killed for lack of memory; run "
            "the same command again, it continues where it stopped (fewer workers need less memory). A script "
            "that starts workers must do so under `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(make_function: Callable[[], Callable[[Any], Any]]) -> None:
    global _function  # noqa: PLW0603  a worker process serves one build
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make_function()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: Any) -> Any:
    assert _function is not None
    return _function(task)
