"""Ways to make a trained model larger, beside ours: what each does to the logits at once, and how it trains on.

One small model is trained on Chinese text, grown by every method (`growth_methods.py` says what each does) to the same
target, and each of the grown models is trained on for as many steps with the same batches and the same constant
learning rate; models from scratch begin with the first batches. The error unit is the standard deviation of the
source's logits; FLOPs include the source's. This is a tiny model in its first few hundred steps: what is seen of the
curves is no claim about what growth saves in pretraining.

    python benchmarks/growth_peers.py --documents ../shared/data/pretrain_zh_small.jsonl.gz
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import itertools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from growth_methods import CASES, SOURCE, Arrays, Grow

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.model.t5 import bind, count_parameters, declare_parameters, init_parameters
from t5pegasus.presets import tiny
from t5pegasus.sample import TRAIN_PATH
from t5pegasus.sharding import make_mesh
from t5pegasus.train.data_sources import fit_to_examples
from t5pegasus.train.heldout_loss import make_heldout_loss
from t5pegasus.train.state import TrainState, start_state
from t5pegasus.train.step import make_train_step

MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS = 64, 24
BATCH_SIZE, HELDOUT_BATCHES = 8, 12
OURS = ("ours: default", "mapped, rewarm")
"""What the others' last losses are compared with."""
SOURCE_KEY = ("the source itself", "kept")


def main() -> None:
    """Train, grow, train on; print a table per target, write all curves to OUTPUT_PATH/curves.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="default: the embedded sample")
    parser.add_argument("--output-path", type=Path, default=Path("runs/growth-peers"))
    parser.add_argument("--vocab-size", type=int, default=4608)
    parser.add_argument("--source-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60, help="after growth")
    parser.add_argument("--every", type=int, default=20, help="steps between held-out losses")
    parser.add_argument("--warmup-steps", type=int, default=10, help="of sources, fresh optimizers and new entries")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="constant after the warm-up")
    parser.add_argument("--seeds", type=int, default=2, help="each a source of its own, with its order of data")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    began = time.perf_counter()
    optimizer = OptimizerConfig(
        learning_rate=args.learning_rate, schedule="constant", warmup_steps=args.warmup_steps,
        rewarm_steps=args.warmup_steps,
    )  # fmt: skip
    config = RunConfig(
        model=dataclasses.replace(tiny().model, **SOURCE),
        data=DataConfig(MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS),
        optimizer=optimizer,
        train=TrainConfig(batch_size=BATCH_SIZE),
    )
    examples = build_examples(args.documents, args.output_path, args.vocab_size)
    with PackedRows(examples, config.data, config.model.pad_token_id, config.model.decoder_start_token_id) as rows:
        config = fit_to_examples(config, rows.shards.manifest)
    print(f"Python {platform.python_version()}, jax {jax.__version__}, {jax.default_backend()}; "
          f"source {count_parameters(config.model):,} parameters, {args.source_steps} steps of {BATCH_SIZE} rows, "
          f"{args.seeds} seeds", flush=True)  # fmt: skip
    results = measure(config, examples, args)
    args.output_path.mkdir(parents=True, exist_ok=True)
    with (args.output_path / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "method", "optimizer", "seed", "step", "heldout_loss"])
        for (case, name, state), runs in results.items():
            for seed, run in enumerate(runs):
                writer.writerows([case, name, state, seed, *point] for point in run.curve)
    for case in args.cases:
        chosen = {(method, state): runs for (name, method, state), runs in results.items() if name == case}
        print_table(case, chosen, [step for step, _ in chosen[OURS][0].curve])
    print(f"\n{time.perf_counter() - began:.0f} s")


def build_examples(documents: Path | None, output_path: Path, vocab_size: int) -> Path:
    """Tokenizer and examples by the command a user would type; a build done before is found done."""

    def run(verb: str, *arguments: Any) -> None:
        importlib.import_module(f"launch.verbs.{verb}").main([str(argument) for argument in arguments])

    tokenizer, examples = output_path / "tokenizer", output_path / "examples"
    lengths = "--max-source-tokens", MAX_SOURCE_TOKENS, "--max-target-tokens", MAX_TARGET_TOKENS
    texts = documents or TRAIN_PATH
    run("tokenizer", "train", "--input", texts, "--output-path", tokenizer, "--vocab-size", vocab_size)
    run("build", texts, "--output-path", examples, "--heldout-documents", 60, "--tokenizer-path", tokenizer, *lengths)
    return examples


class Run(NamedTuple):
    """What one method did under one seed."""

    curve: list[tuple[int, float]]
    """(steps after growth, held-out loss)."""
    flops: float
    """Of these steps."""
    errors: tuple[float, ...] = ()
    """Of the logits at growth: largest and root mean square, in float32, then in float64."""


class Trainer:
    """Training of one shape, compiled once for all methods and seeds."""

    def __init__(self, config: RunConfig, held: list[Batch]) -> None:
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.config, self._held = config, held
        self._step, self._heldout = make_train_step(config, mesh), make_heldout_loss(config, mesh)
        data = config.data
        row = training_flops_per_row(config.model, data.max_source_tokens, data.max_target_tokens)
        self.flops_per_step = row * BATCH_SIZE

    def train(self, state: TrainState, batches: Sequence[Batch], every: int) -> tuple[TrainState, Run]:
        """Train on these batches; the loss before the first and after every so many."""
        curve = [(0, self._heldout(state.parameters, self._held)["loss"])]
        for count, batch in enumerate(batches, start=1):
            state, _ = self._step(state, batch)
            if count % every == 0 or count == len(batches):
                curve.append((count, self._heldout(state.parameters, self._held)["loss"]))
        return jax.device_get(state), Run(curve, self.flops_per_step * len(batches))


Results = dict[tuple[str, str, str], list[Run]]
"""(target, method, its optimizer) → one run per seed."""


def measure(config: RunConfig, examples: Path, args: argparse.Namespace) -> Results:
    """All methods under all seeds."""
    ids = config.model.pad_token_id, config.model.decoder_start_token_id
    with PackedRows(examples / "heldout", config.data, *ids) as rows:
        held = list(itertools.islice(load_epoch(rows, BATCH_SIZE), HELDOUT_BATCHES))
    small = Trainer(config, held)
    targets = {case: dataclasses.replace(config.model, **CASES[case][0]) for case in args.cases}
    trainers = {case: Trainer(dataclasses.replace(config, model=model), held) for case, model in targets.items()}
    results: Results = {}
    for seed in range(args.seeds):
        batches = read_batches(config, examples, seed, args.source_steps + args.steps)
        state, past = small.train(fresh_state(config.model, seed), batches[: args.source_steps], args.source_steps)
        after = batches[args.source_steps :]
        _, small_run = small.train(state, after, args.every)
        small_run = small_run._replace(flops=past.flops + small_run.flops)
        for case, trainer in trainers.items():
            results.setdefault((case, *SOURCE_KEY), []).append(small_run)
            for method in CASES[case][1]:
                errors = measure_errors(method.grow, state, config.model, targets[case], seed, held[0])
                grown = method.grow(state, config.model, targets[case], seed)
                _, run = trainer.train(grown, after, args.every)
                report(
                    results,
                    (case, method.name, method.optimizer),
                    run._replace(errors=errors, flops=past.flops + run.flops),
                )
            equal = round(args.steps + args.source_steps * small.flops_per_step / trainer.flops_per_step)
            _, run = trainer.train(fresh_state(targets[case], seed), batches[:equal], args.every)
            begin = run._replace(curve=run.curve[: len(small_run.curve)], flops=trainer.flops_per_step * args.steps)
            report(results, (case, "from scratch", "fresh"), begin)
            report(results, (case, f"from scratch, {equal} steps", "fresh"), run._replace(curve=run.curve[-1:]))
    return results


def report(results: Results, key: tuple[str, str, str], run: Run) -> None:
    """Note a run, and say so."""
    results.setdefault(key, []).append(run)
    print(*key, run, sep=" | ", file=sys.stderr, flush=True)


def read_batches(config: RunConfig, examples: Path, seed: int, count: int) -> list[Batch]:
    """The first batches of a seed's order."""
    data = dataclasses.replace(config.data, seed=seed)
    with (
        PackedRows(examples, data, config.model.pad_token_id, config.model.decoder_start_token_id) as rows,
        contextlib.closing(load_batches(rows, BATCH_SIZE, start_row=0)) as batches,
    ):
        return list(itertools.islice(batches, count))


def fresh_state(model: ModelConfig, seed: int) -> TrainState:
    """Of a model that has learned nothing yet."""
    return start_state(init_parameters(model, seed), declare_parameters(model))


@functools.cache
def logits_of(model: ModelConfig, dtype: Any) -> Callable[[Arrays, Batch], jax.Array]:
    """The compiled forward pass."""
    return jax.jit(lambda parameters, batch: bind(model, parameters, dtype)(batch))


def measure_errors(
    grow: Grow, state: TrainState, source: ModelConfig, target: ModelConfig, seed: int, batch: Batch
) -> tuple[float, ...]:
    """Largest and RMS deviation of the logits in float32, then in float64; unit: standard deviation of the source's."""
    errors, open_rows = [], np.asarray(batch.decoder_loss_weights) > 0
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            wide = in_precision(state, dtype)
            grown = jax.device_get(grow(wide, source, target, seed).parameters)
            assert all(array.dtype == dtype for array in grown.values())
            before = np.asarray(logits_of(source, jnp.dtype(dtype))(wide.parameters, batch), np.float64)[open_rows]
            behind = np.asarray(logits_of(target, jnp.dtype(dtype))(grown, batch), np.float64)[open_rows]
        apart = np.abs(behind - before) / before.std()
        errors += [float(apart.max()), float(np.sqrt(np.mean(apart**2)))]
    return tuple(errors)


def in_precision(state: TrainState, dtype: Any) -> TrainState:
    """The state with all float32 in another precision."""
    arrays = jax.tree.map(np.asarray, state)
    return jax.tree.map(lambda array: array.astype(dtype) if array.dtype == np.float32 else array, arrays)


def print_table(case: str, results: dict[tuple[str, str], list[Run]], steps: Sequence[int]) -> None:
    """Means over the seeds; behind the last one half of what lies between the highest and the lowest."""
    (small, ours), columns = (results[key] for key in (SOURCE_KEY, OURS)), [f"+{step}" for step in steps]
    heading = f"method | optimizer | float32 max / RMS | float64 max / RMS | ΔNLL | {' | '.join(columns)}"
    rule = " | ".join(["---"] * 4 + ["---:"] * (len(columns) + 3))
    print(f"\n**{case}**\n\n| {heading} | last − ours | TFLOP |\n| {rule} |")
    for (method, optimizer), runs in results.items():
        errors = np.mean([run.errors for run in runs], axis=0)
        pairs = [f"{a:.1e} / {b:.1e}" for a, b in errors.reshape(-1, 2)] or ["", ""]
        begins = [run.curve[0][1] - one.curve[0][1] for run, one in zip(runs, small)]
        losses = np.array([[loss for _, loss in run.curve] for run in runs])
        means = [f"{loss:.3f}" for loss in losses.mean(axis=0)]
        means[-1] += f" ± {np.ptp(losses[:, -1]) / 2:.3f}"
        apart = losses[:, -1] - [run.curve[-1][1] for run in ours]
        cells = [
            method, optimizer, *pairs, f"{np.mean(begins):+.1e}" if len(pairs[0]) else "",
            *[""] * (len(columns) - len(means)), *means, f"{apart.mean():+.3f} ± {np.ptp(apart) / 2:.3f}",
            f"{runs[0].flops / 1e12:.2f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    for (method, _), runs in results.items():
        if "exact dynamics" in method:
            apart = max(abs(a - b) for run, one in zip(runs, small) for (_, a), (_, b) in zip(run.curve, one.curve))
            print(f"\n{method} stays within {apart:.1e} of the source's own curve.")


if __name__ == "__main__":
    main()
