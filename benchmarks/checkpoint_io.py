"""Saving and restoring a training state: beside the train step, the bare disk, and Orbax.

One process with one CPU device holds a preset's whole state (parameters and AdamW's two moments). Per round:

- save: how long `CheckpointWriter.save` holds up training, and how long the thread behind it writes; beside `cp` of the
  same files, in the page cache, with fsync; and Orbax's asynchronous save with its defaults;
- restore: from a disk whose page cache was dropped onto the device, with and without comparing checksums; beside bare
  reads of the same files by as many threads, into buffers that are used again, and into memory as new as that of the
  arrays must be; and Orbax's restore.

Then a few train steps are timed alone, and while a save is being written.

    python benchmarks/checkpoint_io.py --folder FOLDER [--preset small] [--rounds 3]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import numpy as np
import orbax.checkpoint as ocp

from t5pegasus.arrays import load_arrays
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import CheckpointInfo, CheckpointWriter, Retention, verify_checkpoint
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.presets import PRESETS
from t5pegasus.sharding import make_mesh
from t5pegasus.train.estimate import abstract_batch
from t5pegasus.train.state import TrainState, init_state, state_to_arrays
from t5pegasus.train.step import make_train_step

SAVE_EVERY_STEPS = 200
THREADS = min(2 * (os.cpu_count() or 1) + 2, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; it is made and emptied")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the first save of a run is told apart")
    config = RunConfig(
        model=PRESETS[args.preset]().model,
        data=DataConfig(256, 64),
        train=TrainConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    mesh = make_mesh(MeshConfig())
    state = init_state(config.model, 0, mesh, config.optimizer)
    shutil.rmtree(args.folder, ignore_errors=True)
    (args.folder / "run" / "tokenizer").mkdir(parents=True)
    times: dict[str, list[float]] = defaultdict(list)
    state = measure_steps(args.folder, config, mesh, state, times)  # moments that are not 0, which would compress
    writer = CheckpointWriter(args.folder / "run")
    for number in range(1, args.rounds + 1):
        measure_disk(args.folder, config, state_to_arrays(state), number, writer, times)
        print(f"round {number} of {args.rounds}", flush=True)
    report({name: statistics.median(seconds) for name, seconds in times.items()}, state_to_arrays(state))
    shutil.rmtree(args.folder)


def measure_disk(
    folder: Path,
    config: RunConfig,
    arrays: Mapping[str, Any],
    number: int,
    writer: CheckpointWriter,
    times: dict[str, list[float]],
) -> None:
    """One round of saves and restores; Orbax and we take turns in going first."""
    ours, theirs = folder / "run" / "checkpoints" / str(number), folder / "orbax"
    shutil.rmtree(theirs, ignore_errors=True)
    sides = [
        lambda: save_ours(writer, config, arrays, number, times),
        lambda: save_theirs(theirs, arrays, times),
    ]
    for side in sides if number % 2 else reversed(sides):
        side()
    copy, files = folder / "copy", [file for file in ours.rglob("*") if file.is_file()]
    shutil.rmtree(copy, ignore_errors=True)
    read_files(files)
    with timed(times, "cp"):
        subprocess.run(["cp", "-r", ours, copy], check=True)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(flush, [file for file in copy.rglob("*") if file.is_file()]))
    shutil.rmtree(copy)
    shardings = {name: array.sharding for name, array in arrays.items()}
    chunks = [file for file in files if file.name not in ("zarr.json",) and "arrays" in file.parts]
    restores: dict[str, Callable[[], Any]] = {
        "raw read": lambda: read_files(chunks),
        "raw read into new memory": lambda: read_into_new_memory(chunks),
        "restore": lambda: load_arrays(ours, shardings=shardings),
        "restore, not verified": lambda: load_arrays(ours, shardings=shardings, verify=False),
        "verify alone": lambda: verify_checkpoint(ours),
        "Orbax restore": lambda: restore_theirs(theirs, arrays),
    }
    for name, restore in restores.items() if number % 2 else reversed(restores.items()):
        drop_page_cache(folder)
        with timed(times, name):
            restored = jax.block_until_ready(restore())
        if name.endswith("restore"):
            assert all(to_bytes(restored[key]) == to_bytes(array) for key, array in arrays.items()), name
        del restored


def to_bytes(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def save_ours(
    writer: CheckpointWriter, config: RunConfig, arrays: Mapping[str, Any], step: int, times: dict[str, list[float]]
) -> None:
    info = CheckpointInfo(config, step, 0, "float32", "f" * 64)
    began = time.perf_counter()
    writer.save(arrays, info, Retention(last=1))
    times["stall" if step > 1 else "first stall"].append(time.perf_counter() - began)
    with timed(times, "writing"):
        writer.finish()


def save_theirs(path: Path, arrays: Mapping[str, Any], times: dict[str, list[float]]) -> None:
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as writer:
        began = time.perf_counter()
        writer.save(path.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))
        times["Orbax stall"].append(time.perf_counter() - began)
        with timed(times, "Orbax writing"):
            writer.wait_until_finished()
    flush_all(path)


def restore_theirs(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    restore_args = {name: ocp.ArrayRestoreArgs(sharding=array.sharding) for name, array in arrays.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path.absolute(), args=ocp.args.PyTreeRestore(dict(arrays), restore_args=restore_args))


def measure_steps(
    folder: Path, config: RunConfig, mesh: Any, state: TrainState, times: dict[str, list[float]]
) -> TrainState:
    """Train steps alone, and those that begin while a save is being written."""
    random = np.random.default_rng(0)
    shapes = abstract_batch(config, mesh)

    def draw(name: str, shape: Any) -> jax.Array:
        values = random.integers(3, 1000, shape.shape) if name.endswith("tokens") else np.ones(shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    batch = Batch(*(draw(name, getattr(shapes, name)) for name in Batch._fields))
    train_step = make_train_step(config, mesh)
    writer = CheckpointWriter(folder / "run")
    for step in range(4):
        with timed(times, "step") if step else timed(defaultdict(list), ""):  # the first one compiles
            state, values = jax.block_until_ready(train_step(state, batch))
        assert np.isfinite(values["loss"]), "what is not a number compresses well"
    for step in range(1, 4):
        info = CheckpointInfo(config, 1000 + step, 0, "float32", "f" * 64)
        times["stall between steps"].append(writer.save(state_to_arrays(state), info, Retention(last=1)).copying)
        with timed(times, "step while writing"):
            state, _ = jax.block_until_ready(train_step(state, batch))
        with timed(times, "waiting after a step"):
            writer.finish()
    shutil.rmtree(folder / "run" / "checkpoints")
    return state


def report(medians: dict[str, float], arrays: Mapping[str, Any]) -> None:
    num_bytes = sum(array.nbytes for array in arrays.values())
    print(f"\n{num_bytes / 1e9:.2f} GB of state in {len(arrays)} arrays; medians:")
    for name, seconds in medians.items():
        speed = "" if "step" in name or "stall" in name else f"  {num_bytes / 1e9 / seconds:5.2f} GB/s"
        print(f"  {name:<26}{seconds:8.3f} s{speed}")
    of_training = SAVE_EVERY_STEPS * medians["step"]
    stall = medians["stall between steps"]
    writing = medians["stall"] + medians["writing"]
    extra = max(0.0, medians["step while writing"] - medians["step"]) + medians["waiting after a step"]
    print(f"save stall / ({SAVE_EVERY_STEPS} × step time): {stall / of_training:.3%} (bar 2 %)")
    print(f"with what the steps beside it lose / ({SAVE_EVERY_STEPS} × step time): {(stall + extra) / of_training:.3%}")
    print(f"a whole save / cp + fsync: {writing / medians['cp']:.2f}; Orbax's / cp + fsync: "
          f"{(medians['Orbax stall'] + medians['Orbax writing']) / medians['cp']:.2f}")  # fmt: skip
    raw, bare = medians["raw read"], medians["restore, not verified"]
    print(f"restore without checksums / raw cold read: {bare / raw:.2f} (bar 1.2)")
    print(f"restore with checksums / raw cold read: {medians['restore'] / raw:.2f}")
    print(f"raw cold read into new memory / raw cold read: {medians['raw read into new memory'] / raw:.2f}")
    print(f"Orbax's restore, which compares none / raw cold read: {medians['Orbax restore'] / raw:.2f}")
    print(f"stall, Orbax's / ours: {medians['Orbax stall'] / medians['stall']:.2f}; "
          f"restore, Orbax's / ours verified: {medians['Orbax restore'] / medians['restore']:.2f}")  # fmt: skip


class timed:
    """Appends the seconds that a block takes."""

    def __init__(self, times: dict[str, list[float]], name: str):
        self.seconds = times[name]

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def read_files(files: list[Path]) -> None:
    """Read files by threads into buffers that are used again."""

    def read(file: Path) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, files))


def read_into_new_memory(files: list[Path]) -> list[np.ndarray]:
    """Read files by threads, each whole, into memory that the kernel has yet to hand out and to clear."""

    def read(file: Path) -> np.ndarray:
        content = np.empty(file.stat().st_size, np.uint8)
        with file.open("rb", buffering=0) as stream:
            done = 0
            while done < len(content):
                done += stream.readinto(content.data[done : done + (1 << 20)])
        return content

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, files))


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            flush(file)


def drop_page_cache(folder: Path) -> None:
    """Of the whole machine where that is permitted, else of these files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
    except OSError:
        for file in folder.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


if __name__ == "__main__":
    main()
