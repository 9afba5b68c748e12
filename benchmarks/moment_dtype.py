"""What moments in bfloat16 do to a learning curve: held-out losses beside those with moments in float32.

One tiny model is trained on the same rows from the same weights:
- float32: moments as usual;
- twin: the same from weights that were each moved to a neighbouring float32: what rounding alone does;
- bfloat16: optimizer.moment_dtype=bfloat16, rounded stochastically;
- to nearest: the same with the rounding that it has instead, which no run can choose: why the other is there.

    python benchmarks/moment_dtype.py --data-path ../shared/data/pretrain_zh_small.jsonl.gz
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.model.t5 import count_parameters, declare_parameters, init_parameters
from t5pegasus.presets import tiny
from t5pegasus.sharding import make_mesh, place_batch
from t5pegasus.train.data_sources import fit_to_examples
from t5pegasus.train.heldout_loss import make_heldout_loss
from t5pegasus.train.optimizer import update
from t5pegasus.train.state import start_state
from t5pegasus.train.step import make_train_step

LENGTHS = {"max-source-tokens": 96, "max-target-tokens": 32}
SIDES = ("float32", "twin", "bfloat16", "to nearest")


def main() -> None:
    """Train all sides of all optimizers and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="documents")
    parser.add_argument("--output-path", type=Path, default=Path("runs/moment-dtype"))
    parser.add_argument("--optimizers", nargs="+", default=["adamw:0.98", "adamw:0.999"], help="NAME:BETA2")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100, help="steps between held-out losses")
    args = parser.parse_args()
    examples = build_examples(args.data_path, args.output_path)
    config = RunConfig(
        model=tiny().model,
        data=DataConfig(max_source_tokens=LENGTHS["max-source-tokens"], max_target_tokens=LENGTHS["max-target-tokens"]),
        train=TrainConfig(steps=args.steps, batch_size=args.batch_size),
    )
    ids = config.model.pad_token_id, config.model.decoder_start_token_id
    with contextlib.ExitStack() as stack:
        rows, heldout = (
            stack.enter_context(PackedRows(path, config.data, *ids)) for path in (examples, examples / "heldout")
        )
        config = fit_to_examples(config, rows.shards.manifest)
        held = list(itertools.islice(load_epoch(heldout, 16), 16))
        print(f"Python {platform.python_version()}, jax {jax.__version__}; {count_parameters(config.model):,} "
              f"parameters, {args.steps} updates of {args.batch_size} of {rows.num_rows:,} rows")  # fmt: skip
        for each in args.optimizers:
            name, _, beta2 = each.partition(":")
            optimizer = OptimizerConfig(
                name=name, beta2=float(beta2 or 0.98), learning_rate=args.learning_rate, warmup_steps=args.steps // 8
            )
            losses = {
                side: list(train(dataclasses.replace(config, optimizer=optimizer), side, rows, held, args.every))
                for side in SIDES
            }
            print_table(each, losses, args.every)


def build_examples(documents: Path, output_path: Path) -> Path:
    """Tokenizer and examples by the command a user would type; a build done before is found done."""

    def run(verb: str, *arguments: Any) -> None:
        importlib.import_module(f"launch.verbs.{verb}").main([str(argument) for argument in arguments])

    tokenizer, examples = output_path / "tokenizer", output_path / "examples"
    flags = [part for name, value in LENGTHS.items() for part in (f"--{name}", value)]
    run("tokenizer", "train", "--input", documents, "--output-path", tokenizer, "--vocab-size", 4608)
    run("build", documents, "--output-path", examples, "--heldout-documents", 60, "--tokenizer-path", tokenizer, *flags)
    return examples


def train(config: RunConfig, side: str, rows: PackedRows, held: list[Batch], every: int) -> Iterator[float]:
    """Held-out loss behind every so many updates."""
    specs, size = declare_parameters(config.model), config.train.batch_size
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    dtype = "bfloat16" if side in ("bfloat16", "to nearest") else "float32"
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moment_dtype=dtype))
    parameters = init_parameters(config.model, config.train.seed)
    if side == "twin":
        parameters = move_to_neighbours(parameters)
    state = start_state(parameters, specs, config.optimizer)
    train_step, heldout_loss = make_train_step(config, mesh), make_heldout_loss(config, mesh)
    rounding = mock.patch.object(update, "round_stochastically", lambda array, *_: array.astype(jnp.bfloat16))
    began = time.perf_counter()
    with (
        rounding if side == "to nearest" else contextlib.nullcontext(),
        contextlib.closing(load_batches(rows, size, start_row=0)) as batches,
    ):
        for step, batch in zip(range(1, config.train.steps + 1), batches):
            state, _ = train_step(state, place_batch(batch, np.arange(size), size, mesh))
            if step % every == 0:
                yield heldout_loss(state.parameters, held)["loss"]
    print(f"  {side}: {time.perf_counter() - began:.0f} s", flush=True)


def move_to_neighbours(parameters: dict[str, Any]) -> dict[str, Any]:
    """Every weight replaced by the next float32 above or below, by the toss of a coin."""
    random = np.random.default_rng(0)
    sides = {
        name: np.where(random.random(np.shape(value)) < 0.5, -np.inf, np.inf) for name, value in parameters.items()
    }
    return {name: jnp.nextafter(value, jnp.float32(sides[name])) for name, value in parameters.items()}


def print_table(optimizer: str, losses: dict[str, list[float]], every: int) -> None:
    """Losses by step, and how far each side is from float32."""
    others = [side for side in losses if side != "float32"]
    print(f"\n{optimizer}\n| updates | {' | '.join(losses)} | {' | '.join(f'{side} − float32' for side in others)} |")
    print(f"|{' ---: |' * (1 + len(losses) + len(others))}")
    for index, reference in enumerate(losses["float32"]):
        cells = [f"{values[index]:.4f}" for values in losses.values()]
        cells += [f"{losses[side][index] - reference:+.4f}" for side in others]
        print(f"| {(index + 1) * every} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
