"""What a run reports: one JSON line per record (the source of truth) and the same scalars for TensorBoard."""

import contextlib
import functools
import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.chips import find_chip
from t5pegasus.config import RunConfig
from t5pegasus.errors import DivergedError, writing
from t5pegasus.model.flops import training_flops_per_row

logger = logging.getLogger(__name__)


@functools.cache
def peak_flops(device: Any) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure comes from.

    An accelerator's is its maker's; a CPU has none that holds for all, so the speed of one large float32 matrix
    product is measured here and shared by the devices that XLA makes of the one CPU.
    """
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.peak_flops, f"bfloat16 peak of {chip.device_kind}"
    size = 1024
    multiply = jax.jit(lambda x: x @ x)
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    peak = 2 * size**3 / min(seconds) / jax.local_device_count()
    return peak, f"measured: float32 product of {size}×{size} matrices"


def count_flops(config: RunConfig, num_rows: int) -> int:
    """FLOPs of training on so many rows of this config; a whole number, so that sums do not depend on their order."""
    data = config.data
    return int(training_flops_per_row(config.model, data.max_source_tokens, data.max_target_tokens)) * num_rows


class Meter:
    """Sums over one logging interval: losses as the mean of its updates, speeds over its wall time."""

    def __init__(self, config: RunConfig, flops: int = 0):
        self.batch_size = config.train.batch_size
        self.flops_per_step = count_flops(config, self.batch_size)
        self.flops = flops
        """Spent on training this model and those it came from, up to the last update added."""
        self.peak = peak_flops(jax.local_devices()[0])[0] * jax.device_count()
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.waiting_seconds = 0.0
        self.paused_seconds = 0.0
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waiting_seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time spent inside (evaluation, saving) out of the training speed."""
        began = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - began

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Take in the numbers of one update, waiting for the device to have them.

        Raises:
            DivergedError: if the loss or the gradient norm is not finite.
        """
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            raise DivergedError(
                f"update {step}: loss={numbers['loss']}, grad_norm={numbers['grad_norm']} are not finite; the last "
                "checkpoint is intact. Lower optimizer.learning_rate, lengthen warmup_steps, or look at the data"
            )
        self.rows = int(numbers.pop("rows"))
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number
        self.steps += 1
        self.flops += self.flops_per_step

    def report(self) -> dict[str, Any]:
        """The record of the interval; the next one begins."""
        seconds = max(1e-9, time.perf_counter() - self.began - self.paused_seconds)
        tokens = self.sums.pop("source_tokens") + self.sums.pop("target_tokens")
        record = {
            "rows": self.rows,
            **{name: total / self.steps for name, total in self.sums.items()},
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "rows_per_second": self.steps * self.batch_size / seconds,
            "mfu": self.flops_per_step * self.steps / seconds / self.peak,
            "data_wait_fraction": self.waiting_seconds / seconds,
            "flops": self.flops,
        }
        self._reset()
        return record


class MetricsWriter:
    """Appends records to `metrics.jsonl` and their numbers to `tensorboard/` of a run folder.

    Only the first process writes. Records later than `from_step` are dropped on opening: a resumed run makes
    them again, and each step stands in the file once. A run that begins anew passes -1. So is what was recorded of an
    event, and behind it, that the checkpoint's lineage, `plan_hashes`, does not know: it will be made again, too.
    """

    def __init__(self, run_path: Path, from_step: int, plan_hashes: Collection[str] = ()):
        self.path = run_path / "metrics.jsonl"
        self.writes = jax.process_index() == 0
        if not self.writes:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= from_step] if self.path.exists() else []
        made_again = (line.get("plan_hash") not in (None, *plan_hashes) for line in kept)
        kept = kept[: next((index for index, again in enumerate(made_again) if again), None)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = _EventFile(run_path / "tensorboard", purge_step=from_step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record {kind, step, …}; its float values also go to TensorBoard as kind/name."""
        if not self.writes:
            return
        with writing(self.path):
            self.file.write(_line({"kind": kind, "step": step, **values}))
            self.file.flush()
        self.tensorboard.write(
            step, {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, float)}
        )

    def close(self) -> None:
        """Close both files; every record was flushed when it was written."""
        if self.writes:
            with contextlib.closing(self.tensorboard), writing(self.path):
                self.file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _EventFile:
    """TensorBoard's events, written in this thread: a disk that is full is noticed where the record is written.

    tensorboardX's SummaryWriter writes them in a thread of its own, and waits for ever once that has failed.
    """

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue] - made at run time

        self._folder = folder
        folder.mkdir(exist_ok=True)
        with writing(folder):
            self._writer = EventsWriter(str(folder / "events"))
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for tag, value in scalars.items():
            self._write(step=step, summary=scalar(tag, value))

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made at run time

        with writing(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), **fields))
            self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is passed over."""
    records = []
    # Cut off inside a character, the line is no UTF-8 either.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            logger.warning("%s: dropping an incomplete line, left by an interrupted run", path)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
