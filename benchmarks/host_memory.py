"""Train steps on a CPU by how glibc's malloc gets and returns memory.

XLA takes its temporary buffers anew at every step, and the kernel hands out and clears them page by page. With 2 MiB
pages (`huge`) there are hundreds of times fewer of them; a process that keeps what it freed (`kept`) gets them once.
Takes the settings in turn, each in a process of its own.

    python benchmarks/host_memory.py --preset small
"""

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import time

SETTINGS = {
    "default": "",
    "huge": "glibc.malloc.hugetlb=1",
    "kept": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776",
}
STEPS, WARM_STEPS = 8, 2


def main() -> None:
    """Print every run, and medians with their ratio to the default's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="8 rows of 256/64 of a preset with 50,000 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.preset)
        return
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, tunables in SETTINGS.items():
            command = [sys.executable, __file__, "--child", "--preset", args.preset]
            environment = {**os.environ, "GLIBC_TUNABLES": tunables}
            line = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            print(f"{name:<8} {line}", end="", flush=True)
            seconds[name].append(float(line.split()[0]))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<8} median {median:.3f} s, default / {name} {medians['default'] / median:.2f}; {SETTINGS[name]}")


def measure(preset: str) -> None:
    """Seconds of the median step, with system seconds, page faults and the largest resident size."""
    import jax
    import step_speed

    import t5pegasus.presets
    from t5pegasus.config import DataConfig, MeshConfig, RunConfig, TrainConfig

    model = dataclasses.replace(
        getattr(t5pegasus.presets, preset)().model, vocab_size=step_speed.VOCABULARY, dropout_rate=0.1
    )
    config = RunConfig(
        model=model,
        data=DataConfig(step_speed.SOURCE, step_speed.TARGET),
        mesh=MeshConfig(data=1),
        train=TrainConfig(batch_size=step_speed.ROWS),
    )
    take_step, _ = step_speed.our_step(config)
    batch = next(step_speed.full_rows())
    for _ in range(WARM_STEPS):
        take_step(batch)
    taken = []
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        began = time.perf_counter()
        take_step(batch)
        taken.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
    print(
        f"{statistics.median(taken):.3f} s a step (least {min(taken):.3f}, most {max(taken):.3f}), "
        f"{system / STEPS:.3f} s system, {faults / STEPS:,.0f} faults; {after.ru_maxrss / 2**20:.1f} GiB at most; "
        f"{jax.__version__}"
    )


if __name__ == "__main__":
    main()
