"""`t5pegasus finetune`: train a checkpoint on pairs of text and summary, in the same loop."""

import dataclasses
import math
from pathlib import Path

import tyro

from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig

DEFAULT_OPTIMIZER = OptimizerConfig(learning_rate=5e-4, schedule="constant", warmup_steps=50, beta2=0.999)
DEFAULT_TRAIN = TrainConfig(
    batch_size=32, log_every_steps=10, evaluate_every_steps=200, save_every_steps=200, keep_checkpoints=2
)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train a checkpoint on pairs of text and summary: jsonl {text, summary} or lines title<TAB>text.

    For example: t5pegasus finetune runs/tiny --train-path train.jsonl --heldout-path dev.jsonl --run-path runs/title

    The pairs become example shards under RUN_PATH/examples, with the checkpoint's own tokenizer. The same command
    again continues where the run stopped, or finds it finished.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, or a run whose last good one is meant."""
    train_path: Path
    """Pairs to train on (.jsonl, .tsv, .gz and .zst of them)."""
    run_path: Path
    """Folder of this run."""
    heldout_path: Path | None = None
    """Pairs for the held-out loss."""
    epochs: float = 5.0
    """Passes over the pairs; decides the number of updates."""
    dropout_rate: float | None = None
    """Instead of the checkpoint's."""
    data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(256, 64))
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: DEFAULT_OPTIMIZER)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=lambda: DEFAULT_TRAIN)


def main(argv: list[str]) -> None:
    """Parse, turn the pairs into examples, train, print where the result lies."""
    args = tyro.cli(Finetune, prog="t5pegasus finetune", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    finetune(args)


def finetune(args: Finetune) -> Path:
    """Fine-tune and return the folder of the last checkpoint."""
    from launch.verbs.pretrain import report_result
    from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info
    from t5pegasus.data.loader import PackedRows
    from t5pegasus.train.run import RunPaths, train_run

    source = find_checkpoint(args.checkpoint)
    model = load_checkpoint_info(source).config.model
    if args.dropout_rate is not None:
        model = dataclasses.replace(model, dropout_rate=args.dropout_rate)
    examples = build_pairs(args.train_path, source / "tokenizer", args.run_path / "examples", args.data)
    heldout = None
    if args.heldout_path is not None:
        heldout = build_pairs(args.heldout_path, source / "tokenizer", args.run_path / "heldout_examples", args.data)
    with PackedRows(examples, args.data, model.pad_token_id, model.decoder_start_token_id) as rows:
        steps = math.ceil(args.epochs * rows.num_rows / args.train.batch_size)
    train = dataclasses.replace(args.train, steps=steps)
    config = RunConfig(model, args.data, args.optimizer, args.mesh, train)
    paths = RunPaths(args.run_path, examples, heldout, source)
    checkpoint = train_run(config, paths, keep_state=False)
    report_result(checkpoint, args.run_path, f"t5pegasus evaluate {args.run_path} --pairs-path PAIRS")
    return checkpoint
