"""`t5pegasus few-shot`: fine-tune on 10, 100 and 1,000 pairs under several seeds, and compare in a table."""

import dataclasses
import difflib
import shlex
from pathlib import Path
from typing import Any, Literal

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.verbs.finetune import DEFAULT_OPTIMIZER
from launch.verbs.finetune import TrainFlags as FinetuneFlags
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.json_files import SCHEMA, write_json
from t5pegasus.storage import fetch


@dataclasses.dataclass(frozen=True)
class DataFlags(DataConfig):
    """Lengths of one row."""

    max_source_tokens: int = 256
    max_target_tokens: int = 64
    pack: bool = False
    """Several pairs share a row, so that an update sees more of them; False gives one pair per row."""
    seed: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 0  # that of the cell
    mixture: tyro.conf.SuppressFixed[tyro.conf.Fixed[tuple[str, ...]]] = ()  # of pretraining


@dataclasses.dataclass(frozen=True)
class OptimizerFlags(OptimizerConfig):
    """The optimizer and its schedule."""

    learning_rate: float = DEFAULT_OPTIMIZER.learning_rate
    schedule: Literal["constant", "cosine", "wsd", "piecewise"] = DEFAULT_OPTIMIZER.schedule
    warmup_steps: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 0  # follows from warmup_fraction
    beta2: float = DEFAULT_OPTIMIZER.beta2


@dataclasses.dataclass(frozen=True)
class TrainFlags(FinetuneFlags):
    """In what portions to train, and what to keep."""

    batch_size: int = 16
    """Pairs per update."""
    evaluate_every_steps: int = 1_000_000
    """Evaluations decide something only with --train.keep-best; otherwise each run is evaluated at its ends."""
    save_every_steps: int = 1_000_000
    keep_checkpoints: int = 1
    seed: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = 0  # that of the cell
    max_scored_pairs: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = TrainConfig.max_scored_pairs


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Fine-tune a checkpoint on few pairs, under several seeds, and print mean ± standard deviation of the scores.

    For example: t5pegasus few-shot runs/base --train-path train.jsonl --heldout-path dev.jsonl --output-path runs/few

    Of each seed the smaller sets are part of the larger ones. All cells make the same number of updates. The same
    command again finds the finished cells done and continues; with further sizes or seeds it makes those, too.
    """

    checkpoint: tyro.conf.Positional[StoragePath]
    """Checkpoint folder, or a run whose best or last good one is meant."""
    train_path: StoragePath
    """Pairs to draw from (.jsonl or .tsv, also .gz and .zst)."""
    heldout_path: StoragePath
    """Pairs to score on."""
    output_path: Path
    """Folder of the cells, and of few_shot.json."""
    sizes: tuple[int, ...] = (10, 100, 1000)
    """Numbers of pairs; 0, the checkpoint as it is, is always among the results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each chooses its pairs, their order and the dropout."""
    updates: int = 400
    """Of every cell, whatever its size."""
    warmup_fraction: float = 0.1
    """Share of the updates over which the learning rate rises."""
    scores: tuple[str, ...] = ("rouge-1", "rouge-2", "rouge-l", "bleu")
    """What the table shows, by the names of `t5pegasus evaluate`; few_shot.json has all."""
    max_heldout_pairs: int = 500
    """Held-out pairs to use, the first ones."""
    keep_runs: bool = False
    """Keep the checkpoint of every cell (three times the model's size each)."""
    dropout_rate: float | None = None
    """Instead of the checkpoint's."""
    data: DataFlags = dataclasses.field(default_factory=DataFlags)
    optimizer: OptimizerFlags = dataclasses.field(default_factory=OptimizerFlags)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainFlags = dataclasses.field(default_factory=TrainFlags)

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise UsageError(f"updates={self.updates} must be at least 1")
        if not 0 <= self.warmup_fraction <= 1:
            raise UsageError(f"warmup_fraction={self.warmup_fraction} must lie in [0, 1]")


def main(argv: list[str]) -> None:
    """Parse, make the cells that are missing, print the table and where the results lie."""
    args = parse_command_line(FewShot, prog="t5pegasus few-shot", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    from launch.recipes.few_shot import LOSS, FewShotPlan, run_few_shot, summarise_cells
    from launch.staging import local_checkpoint
    from t5pegasus.checkpoint import load_checkpoint_info
    from t5pegasus.evaluate import DEFINITIONS

    for name in args.scores:
        if name not in DEFINITIONS:
            near = difflib.get_close_matches(name, DEFINITIONS, n=1)
            way_out = f"perhaps you meant {near[0]!r}" if near else f"choose among {', '.join(DEFINITIONS)}"
            raise UsageError(f"scores: {name!r} is no score; {way_out}")
    checkpoint = local_checkpoint(args.checkpoint)
    model = load_checkpoint_info(checkpoint).config.model
    if args.dropout_rate is not None:
        model = dataclasses.replace(model, dropout_rate=args.dropout_rate)
    warmup = round(args.warmup_fraction * args.updates)
    optimizer = OptimizerConfig(**{**dataclasses.asdict(args.optimizer), "warmup_steps": warmup})
    train = TrainConfig(
        **{**dataclasses.asdict(args.train), "steps": args.updates, "max_scored_pairs": args.max_heldout_pairs}
    )
    config = RunConfig(model, DataConfig(**dataclasses.asdict(args.data)), optimizer, args.mesh, train)
    plan = FewShotPlan(
        checkpoint, fetch(args.train_path), fetch(args.heldout_path), args.output_path, args.sizes, args.seeds,
        args.max_heldout_pairs, args.keep_runs,
    )  # fmt: skip
    cells = run_few_shot(plan, config)
    table = summarise_cells(cells, (*DEFINITIONS, LOSS))
    result = {
        "schema": SCHEMA, "checkpoint": str(checkpoint), "updates": args.updates, "batch_size": train.batch_size,
        "definitions": DEFINITIONS, "cells": cells, "table": table,
    }  # fmt: skip
    write_json(args.output_path / "few_shot.json", result)
    print(f"{checkpoint}, {args.updates} updates of {train.batch_size} pairs, mean ± std over {len(args.seeds)} seeds")
    print(format_table(table, (*args.scores, LOSS)))
    print(f"\nresults: {args.output_path / 'few_shot.json'}")
    finetune = ["finetune", args.checkpoint, "--train-path", args.train_path, "--run-path", "runs/finetuned"]
    print(f"next: {shlex.join(map(str, ['t5pegasus', *finetune]))}")


def format_table(table: dict[int, dict[str, dict[str, Any]]], names: tuple[str, ...]) -> str:
    """Lines for people: a row per size, a column per score."""
    width = max(16, *(len(name) + 2 for name in names))
    lines = [f"{'pairs':>7}" + "".join(f"{name:>{width}}" for name in names)]
    for size, row in table.items():
        cells = [
            f"{row[name]['mean']:.2f}" + (f" ± {row[name]['std']:.2f}" if "std" in row[name] else "") for name in names
        ]
        lines.append(f"{size:>7,}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
