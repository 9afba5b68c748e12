"""`t5pegasus finetune`: train a checkpoint on pairs of text and summary, in the same loop."""

import dataclasses
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from launch.attempt import Attempt
from launch.command_line import StoragePath, parse_command_line
from launch.validation import make_sampler, make_scorer
from launch.verbs.pretrain import attempt_facts, report_result
from launch.watch_config import WatchConfig
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.storage import fetch

_NO_FLAGS = {"train.steps": "it follows from the number of pairs; give --epochs"}
DEFAULT_OPTIMIZER = OptimizerConfig(learning_rate=5e-4, schedule="constant", warmup_steps=50, beta2=0.999)


@dataclasses.dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """In what portions to train, and what to keep."""

    steps: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = TrainConfig.steps  # follows from the epochs, so no flag
    batch_size: int = 32
    log_every_steps: int = 10
    evaluate_every_steps: int = 200
    save_every_steps: int = 200
    keep_checkpoints: int = 2
    keep_best: Annotated[str | None, tyro.conf.arg(aliases=["--keep-best"])] = None
    """Score of the held-out pairs (loss, accuracy, rouge-l or another one of `t5pegasus evaluate`) whose best
    checkpoint is kept beside the last ones; the run's name then means that one."""
    patience: Annotated[int, tyro.conf.arg(aliases=["--patience"])] = 0
    """With --keep-best: stop after so many evaluations without a better one; 0 never does."""


@dataclasses.dataclass(frozen=True)
class DataFlags(DataConfig):
    """Lengths of packed rows and the seed of their order."""

    max_source_tokens: int = 256
    max_target_tokens: int = 64
    mixture: tyro.conf.SuppressFixed[tyro.conf.Fixed[tuple[str, ...]]] = ()  # of pretraining


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train a checkpoint on pairs of text and summary: jsonl {text, summary} or lines title<TAB>text.

    For example: t5pegasus finetune runs/tiny --train-path train.jsonl --heldout-path dev.jsonl --run-path runs/title

    The pairs become example shards in the run folder, with the checkpoint's own tokenizer. The same command again
    continues where the run stopped, or finds it finished. Sources may be longer than in pretraining
    (--data.max-source-tokens 1024): relative positions have no limit.
    """

    checkpoint: tyro.conf.Positional[StoragePath]
    """Checkpoint folder, or a run whose best or last good one is meant."""
    run_path: StoragePath
    """Folder of this run."""
    train_path: StoragePath | None = None
    """Pairs to train on (.jsonl or .tsv, also .gz and .zst)."""
    examples_path: StoragePath | None = None
    """Instead of --train-path: examples of pairs, from `t5pegasus build --kind pairs`."""
    heldout_path: StoragePath | None = None
    """Pairs for the held-out loss and scores."""
    epochs: float = 5.0
    """Passes over the pairs; decides the number of updates."""
    dropout_rate: float | None = None
    """Instead of the checkpoint's."""
    data: DataFlags = dataclasses.field(default_factory=DataFlags)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: DEFAULT_OPTIMIZER)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainFlags = dataclasses.field(default_factory=TrainFlags)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)


def main(argv: list[str]) -> None:
    """Parse, turn the pairs into examples, train, print where the result lies."""
    with Attempt(["finetune", *argv]) as attempt:
        _finetune(argv, attempt)


def _finetune(argv: list[str], attempt: Attempt) -> None:
    args = parse_command_line(Finetune, prog="t5pegasus finetune", absent=_NO_FLAGS, args=argv)
    if (args.train_path is None) == (args.examples_path is None):
        raise UsageError("give the pairs either as --train-path FILE or as --examples-path FOLDER")
    if not 0 < args.epochs < math.inf:
        raise UsageError(f"epochs={args.epochs} must be positive")
    attempt.join(args.run_path, args.watch)
    from launch.staging import local_checkpoint
    from t5pegasus.checkpoint import load_checkpoint_info
    from t5pegasus.data.loader import PackedRows
    from t5pegasus.train.run import RunPaths, train_run
    from t5pegasus.train.run_folder import check_run_path

    check_run_path(args.run_path)
    given = ("checkpoint", "train_path", "examples_path", "heldout_path", "epochs", "dropout_rate", "data")
    attempt.begin({name: str(getattr(args, name)) for name in given})
    data = DataConfig(**dataclasses.asdict(args.data))
    source = local_checkpoint(args.checkpoint, arrays=False)
    model = load_checkpoint_info(source).config.model
    if args.dropout_rate is not None:
        model = dataclasses.replace(model, dropout_rate=args.dropout_rate)

    def build(pairs_path: Path, name: str) -> Path:
        return _build_pairs(pairs_path, source / "tokenizer", args.run_path / name, data)

    with attempt.control.doing("build"):
        examples_path = args.examples_path or build(cast(Path, args.train_path), "examples")
        heldout_path = args.heldout_path and build(args.heldout_path, "heldout_examples")
    with PackedRows(examples_path, data, model.pad_token_id, model.decoder_start_token_id) as rows:
        steps = math.ceil(args.epochs * rows.num_rows / args.train.batch_size)
    train = TrainConfig(**{**dataclasses.asdict(args.train), "steps": steps})
    config = RunConfig(model, data, args.optimizer, args.mesh, train)
    paths = RunPaths(args.run_path, examples_path, heldout_path, args.checkpoint)
    scorer = make_scorer(config, source / "tokenizer", args.heldout_path and fetch(args.heldout_path))
    pairs_facts = {"held-out pairs": scorer.fingerprint if scorer else "none"}
    attempt.compare("config and examples", attempt_facts(config, paths) | pairs_facts)
    sampler = make_sampler(config, examples_path, heldout_path)
    checkpoint = train_run(config, paths, keep_state=False, scorer=scorer, sampler=sampler, control=attempt.control)
    pairs = ["--pairs-path", str(args.heldout_path or args.train_path or "PAIRS.jsonl")]
    report_result(checkpoint, args.run_path, shlex.join(["t5pegasus", "evaluate", str(args.run_path), *pairs]))


def _build_pairs(pairs_path: Path, tokenizer_path: Path, output_path: Path, data: DataConfig) -> Path:
    """Examples of the pairs, made by the first process and awaited by the others."""
    import jax
    from jax.experimental import multihost_utils

    from t5pegasus.corpus.build import BuildConfig, build_examples

    if jax.process_index() == 0:
        lengths: dict[str, Any] = {
            "max_source_tokens": data.max_source_tokens,
            "max_target_tokens": data.max_target_tokens,
        }
        build_examples([pairs_path], tokenizer_path, output_path, BuildConfig(kind="pairs", **lengths))
        print(f"{pairs_path}: {describe_pairs(output_path, data)}", file=sys.stderr)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"pairs built in {output_path}")
    return output_path


def describe_pairs(examples_path: Path, data: DataConfig) -> str:
    """How many pairs are used, how many were left out and why, and how many are as long as a row allows."""
    from t5pegasus.data.shards import ExampleShards

    with ExampleShards(examples_path) as shards:
        documents = shards.manifest["documents"]
        sources, targets = (shards.lengths >= (data.max_source_tokens, data.max_target_tokens)).sum(axis=0)
    dropped = "".join(f", {count:,} left out: {reason}" for reason, count in documents["dropped"].items())
    cut = f"; cut off where longer: {sources:,} texts at {data.max_source_tokens} tokens, "
    cut += f"{targets:,} summaries at {data.max_target_tokens}"
    return f"{documents['kept']:,} of {documents['read']:,} pairs{dropped}" + (cut if sources or targets else "")
