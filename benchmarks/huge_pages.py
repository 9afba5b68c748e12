"""Train steps on a CPU with glibc's malloc as it is, and with transparent huge pages.

XLA takes its temporary buffers anew at every step, and the kernel hands out and clears them page by page; with 2 MiB
pages there are hundreds of times fewer of them. Runs itself with and without the setting, alternating.

    python benchmarks/huge_pages.py
"""

import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import time

TUNABLE = "glibc.malloc.hugetlb=1"
STEPS = 8
ROUNDS = 3


def main() -> None:
    """Alternate the two settings and print medians and their ratio."""
    seconds: dict[str, list[float]] = {"": [], TUNABLE: []}
    for _ in range(ROUNDS):
        for tunables, taken in seconds.items():
            environment = {**os.environ, "GLIBC_TUNABLES": tunables}
            child = [sys.executable, __file__, "child"]
            line = subprocess.run(child, env=environment, check=True, capture_output=True, text=True).stdout
            print(f"{tunables or 'default':<28}{line}", end="", flush=True)
            taken.append(float(line.split()[0]))
    plain, huge = (statistics.median(taken) for taken in seconds.values())
    print(f"median {plain:.3f} s default, {huge:.3f} s with {TUNABLE}: ratio {plain / huge:.2f}")


def measure() -> None:
    """Time a small model's train step; print seconds, system seconds and page faults per step."""
    import jax
    import numpy as np

    from t5pegasus.batch import Batch
    from t5pegasus.config import DataConfig, MeshConfig, RunConfig, TrainConfig
    from t5pegasus.presets import tiny
    from t5pegasus.sharding import make_mesh, place_batch
    from t5pegasus.train.state import init_state
    from t5pegasus.train.step import make_train_step

    model = dataclasses.replace(tiny().model, vocab_size=8192, d_model=96, d_ff=256, dropout_rate=0.1)
    config = RunConfig(model=model, data=DataConfig(256, 64), train=TrainConfig(batch_size=16))
    mesh = make_mesh(MeshConfig())
    rng = np.random.default_rng(0)
    rows = np.arange(16)
    source, target = (rng.integers(3, 8192, (16, length), dtype=np.int32) for length in (256, 64))
    ones = [np.ones_like(side) for side in (source, target)]
    places = [np.tile(np.arange(side.shape[1], dtype=np.int32), (16, 1)) for side in (source, target)]
    batch = Batch(
        source,
        ones[0],
        places[0],
        target,
        target,
        ones[1].astype(np.float32),
        ones[1],
        places[1],
        rows.astype(np.uint32),
    )
    placed, state, train_step = (
        place_batch(batch, rows, 16, mesh), init_state(model, 0, mesh), make_train_step(config, mesh)
    )  # fmt: skip
    state, _ = jax.block_until_ready(train_step(state, placed))
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(STEPS):
        state, _ = train_step(state, placed)
    jax.block_until_ready(state)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / STEPS
    print(f"{took / STEPS:.3f} s/step, {(after.ru_stime - before.ru_stime) / STEPS:.3f} s system, {faults:,.0f} faults")


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["child"] else main()
