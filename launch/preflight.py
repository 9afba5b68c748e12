"""Before anything is compiled: all processes of a job compare what must be the same, and say which one differs."""

import functools
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.attempts import attempts_path
from t5pegasus.errors import UsageError
from t5pegasus.storage import write_bytes


def place() -> tuple[int, int]:
    """Number of this process and of all, without waking the devices."""
    from jax._src.distributed import global_state

    return global_state.process_id, global_state.num_processes


def tell(name: str, value: str | None, seconds: float) -> str:
    """What process 0 has to say under a name, in all processes: the others give None and wait for it.

    Raises:
        UsageError: if it does not come in time.
    """
    client, key = _client(), f"t5pegasus/{name}"
    if value is not None:
        client.key_value_set(key, value)
        return value
    return _wait(client, key, seconds, 0)


SAME_COMMAND = "all processes of a job need the same versions, command, examples and devices"


def agree(name: str, facts: Mapping[str, Any], seconds: float, way_out: str = SAME_COMMAND) -> None:
    """Compare facts between all processes.

    Args:
        name: of this comparison: each is made once in a job.
        facts: what must be the same everywhere; texts and numbers.
        seconds: how long to wait for each process; 0 for an hour.
        way_out: the end of the message.

    Raises:
        UsageError: naming the first process that differs and its fact, the same in all processes; or a process that
            does not answer.
    """
    client, process, num_processes = _client(), *place()
    client.key_value_set(f"t5pegasus/{name}/{process}", json.dumps(facts))
    told = functools.partial(tell, f"{name}/verdict", seconds=seconds)
    if process != 0:
        verdict = told(None)
    else:
        verdict = _compare(
            [json.loads(_wait(client, f"t5pegasus/{name}/{i}", seconds, i)) for i in range(num_processes)], way_out
        )
        told(verdict or "the same")
    if verdict and verdict != "the same":
        raise UsageError(verdict)


def agree_on_attempt(run_path: Path, number: int | None, seconds: float) -> int:
    """The number of the attempt, which process 0 gives, where all processes see the same run folder.

    Raises:
        UsageError: where they do not: each would wait for the others' parts of the first checkpoint in vain.
    """
    folder, mark = attempts_path(run_path) / "joining", None
    if number is not None:
        mark = folder / f"attempt-{number}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(mark, b"\n")
    told = tell("attempt", mark and mark.name, seconds)
    seen = "" if (folder / told).is_file() else ", where what process 0 wrote is not to be seen"
    way_out = "the run folder must lie on storage that all of them share, or in a bucket"
    try:
        agree("run path", {"run path": f"{run_path}{seen}"}, seconds, way_out)
    finally:
        if mark is not None:
            mark.unlink()
    return int(told.split("-")[1])


def _compare(each: list[dict[str, Any]], way_out: str = SAME_COMMAND) -> str:
    first = each[0]
    for process, facts in enumerate(each):
        for fact in {**first, **facts}:
            if facts.get(fact) != first.get(fact):
                return f"process {process} has {fact} {facts.get(fact)}, process 0 has {first.get(fact)}: {way_out}"
    return ""


def _wait(client: Any, key: str, seconds: float, process: int) -> str:
    try:
        return client.blocking_key_value_get(key, int(1000 * (seconds or 3600)))
    except Exception as error:  # JAX has no name for this one
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise UsageError(
            f"process {process} did not say within {seconds} s what it was asked ({key}); see what it prints itself"
        ) from None


def _client() -> Any:
    # JAX offers the store behind its own coordination under no public name; Orbax reaches it the same way.
    from jax._src.distributed import global_state

    return global_state.client
