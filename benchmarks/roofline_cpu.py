"""How far the roofline is off where it can be checked: a step on this machine's CPU, predicted, then measured.

    python benchmarks/roofline_cpu.py [--presets tiny small] [--batch 8] [--lengths 256 64] [--steps 5]

The prediction is that of `t5pegasus plan PRESET --topology cpu`: the program's FLOPs at the speed of one large float32
product, measured as MFU's denominator is, and its bytes at the speed of one large addition, each instruction by the
longer of the two. Then the same program runs; the fastest of the steps counts.
"""

import argparse
import dataclasses
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from t5pegasus.config import DataConfig, RunConfig
from t5pegasus.plan.step import plan_step
from t5pegasus.plan.topology import parse_topology
from t5pegasus.presets import preset
from t5pegasus.sharding import make_mesh
from t5pegasus.train.estimate import abstract_batch, abstract_state
from t5pegasus.train.state import init_state
from t5pegasus.train.step import make_train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=2, default=(256, 64))
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    print("| preset | products alone | memory alone | predicted | measured | predicted / measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.presets:
        config = preset(name)
        train = dataclasses.replace(config.train, batch_size=args.batch)
        config = dataclasses.replace(config, data=DataConfig(*args.lengths), train=train)
        times = plan_step(config, parse_topology("cpu")).prediction
        measured = measure(config, args.steps)
        print(
            f"| {name}, {args.batch} × {args.lengths[0]}/{args.lengths[1]} | {times.products:.3f} s "
            f"| {times.memory:.3f} s | {times.step:.3f} s | {measured:.3f} s | {times.step / measured:.2f} |",
            flush=True,
        )


def measure(config: RunConfig, num_steps: int) -> float:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    step = make_train_step(config, mesh)
    described = abstract_state(config, mesh), abstract_batch(config, mesh)
    compiled = step.compile(*described)
    state = init_state(config.model, 0, mesh, config.optimizer)
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = (
            rng.integers(1, 100, leaf.shape) if leaf.dtype == np.int32 and len(leaf.shape) == 2 else np.ones(leaf.shape)
        )
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    batch = jax.tree.map(fill, described[1])
    ones = np.ones_like
    batch = batch._replace(
        encoder_segment_ids=ones(batch.encoder_segment_ids), decoder_segment_ids=ones(batch.decoder_segment_ids)
    )
    seconds = []
    for _ in range(num_steps + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
