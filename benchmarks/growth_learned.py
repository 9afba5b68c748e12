"""What training the maps of a growth gives, for what it costs: held-out loss at equal FLOPs.

From one checkpoint and one plan:
- lossless: grown, not trained;
- learned: grown by maps trained for --steps updates (LiGO, Wang et al. 2023, begun at the lossless maps);
- trained: grown without loss, then trained as usual for as many FLOPs as the maps took.
Then learned and trained are both trained on, for the same number of updates on the same rows.

    python benchmarks/growth_learned.py runs/small --examples-path examples --heldout-path heldout --to d_model=96
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from growth.learned import find_batch_size, learn_growth
from growth.state import grow_state
from growth.t5 import plan_growth
from launch.verbs.grow import choose_target, growing_fields
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import find_checkpoint, load_arrays, load_checkpoint_info
from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import make_mesh, place_batch
from t5pegasus.train.heldout_loss import make_heldout_loss
from t5pegasus.train.metrics import count_flops
from t5pegasus.train.state import TrainState, arrays_to_state, state_shardings
from t5pegasus.train.step import make_train_step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--examples-path", type=Path, required=True)
    parser.add_argument("--heldout-path", type=Path, required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.01])
    parser.add_argument("--more-steps", type=int, default=200, help="updates that both are trained on for")
    args = parser.parse_args()
    path = find_checkpoint(args.checkpoint)
    info, state = load_checkpoint_info(path), arrays_to_state(load_arrays(path))
    config, mesh = info.config, make_mesh(MeshConfig())
    target = choose_target(config.model, args.to, dict.fromkeys(growing_fields()))
    with PackedRows(
        args.heldout_path, config.data, config.model.pad_token_id, config.model.decoder_start_token_id
    ) as rows:
        heldout = list(load_epoch(rows, 16))
    with PackedRows(
        args.examples_path, config.data, config.model.pad_token_id, config.model.decoder_start_token_id
    ) as rows:
        bench = Bench(config, target, mesh, rows, heldout, args.more_steps)
        print(f"source: {bench.measure(config, state.parameters):.4f} nats per target token on {args.heldout_path}")
        lossless = grow_state(state, plan_growth(config.model, target, {}, step=info.step, optimizer=config.optimizer))
        print(f"lossless: {bench.measure(bench.config, lossless.parameters):.4f}")
        flops = 0
        for learning_rate in args.learning_rates:
            choices = {"learned": {"steps": args.steps, "learning_rate": learning_rate}}
            growth = plan_growth(config.model, target, choices, step=info.step, optimizer=config.optimizer)
            with bench.stream(find_batch_size(growth, config), int(state.rows)) as batches:
                grown, training = learn_growth(state, growth, config, batches, mesh)
            begin, end = bench.train_on(grown, 0)
            print(f"learned, rate {learning_rate:g}: {begin:.4f}, then {end:.4f}; {training}", flush=True)
            flops = training.flops
        count = round(flops / count_flops(bench.config, config.train.batch_size))
        begin, end = bench.train_on(lossless, count)
        print(f"trained for the same FLOPs ({count} updates): {begin:.4f}, then {end:.4f}")


class Bench:
    """The grown model's training, on the rows behind the source's."""

    def __init__(self, config: RunConfig, target, mesh: Mesh, rows: PackedRows, heldout: list[Batch], more_steps: int):
        self.config, self.mesh, self.rows, self.heldout = dataclasses.replace(config, model=target), mesh, rows, heldout
        self.more_steps, self.train_step = more_steps, make_train_step(self.config, mesh)

    def measure(self, config: RunConfig, parameters: dict) -> float:
        """Held-out nats per target token."""
        return make_heldout_loss(config, self.mesh)(jax.device_put(parameters), self.heldout)["loss"]

    @contextlib.contextmanager
    def stream(self, batch_size: int, start_row: int) -> Iterator[Iterator[Batch]]:
        """Batches of the rows from there on."""
        with contextlib.closing(load_batches(self.rows, batch_size, start_row)) as batches:
            yield batches

    def train_on(self, grown: TrainState, first: int) -> tuple[float, float]:
        """Held-out loss after so many updates, and after `more_steps` further ones."""
        specs, size = declare_parameters(self.config.model), self.config.train.batch_size
        state = jax.device_put(
            grown, state_shardings(specs, self.mesh, self.config.optimizer, with_ema=bool(grown.ema))
        )
        losses = []
        with self.stream(size, int(grown.rows)) as batches:
            for count in (first, self.more_steps):
                for _ in range(count):
                    state, _ = self.train_step(state, place_batch(next(batches), np.arange(size), size, self.mesh))
                losses.append(self.measure(self.config, state.parameters))
        return losses[0], losses[1]


if __name__ == "__main__":
    main()
