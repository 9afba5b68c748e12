"""`t5pegasus pretrain`: train a model on examples, continue a stopped run, or go on from a grown checkpoint."""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from launch.attempt import Attempt
from launch.command_line import StoragePath, parse_command_line
from launch.validation import make_sampler
from launch.watch_config import WatchConfig
from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json
from t5pegasus.presets import PRESETS, preset
from t5pegasus.storage import open_path

if TYPE_CHECKING:
    from t5pegasus.train.run_folder import RunPaths


@dataclasses.dataclass(frozen=True)
class ModelFlags(ModelConfig):
    """Shape and numerics of the model; fields carry the Hugging Face names."""

    # Of the tokenizer, so no flags.
    vocab_size: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = ModelConfig.vocab_size
    pad_token_id: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = ModelConfig.pad_token_id
    decoder_start_token_id: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = ModelConfig.decoder_start_token_id
    eos_token_id: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = ModelConfig.eos_token_id
    # Of growth.
    num_masked_tokens: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = ModelConfig.num_masked_tokens


_OF_TOKENIZER = (
    "it is the tokenizer's, which the examples were built with; train one of another size by t5pegasus tokenizer train "
    "--vocab-size, build the examples with it, and leave this out"
)
NO_FLAGS = {
    **dict.fromkeys(
        ("model.vocab_size", "model.pad_token_id", "model.decoder_start_token_id", "model.eos_token_id"), _OF_TOKENIZER
    ),
    "model.num_masked_tokens": "tokens are added, and masked, by t5pegasus grow --add-tokens FILE --masked",
}
"""Fields of the config that are none, and why."""


@dataclasses.dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """How long to train, in what portions, and what to keep."""

    # Pretraining writes no summaries, so no flag.
    max_scored_pairs: tyro.conf.SuppressFixed[tyro.conf.Fixed[int]] = TrainConfig.max_scored_pairs


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a model on examples. The same command again continues where the run stopped, or finds it finished.

    For example: t5pegasus pretrain tiny --examples-path examples --run-path runs/tiny --train.steps 200

    The first argument is a preset (tiny, small, base, large, xl) and any field of it can be set by its flag; help
    shows the defaults of the preset before --help, or else those of base. Vocabulary size and special ids are the
    tokenizer's. To go on from a grown checkpoint leave the preset out:

    t5pegasus pretrain --start-from grown --examples-path examples --run-path runs/grown --train.steps 400

    Or grow it on the way, in one command (docs/growth.md, "In a running job"):

    t5pegasus pretrain small --examples-path examples --run-path runs/progressive --growth step=20000:base
    """

    examples_path: StoragePath | None = None
    """Folder written by `t5pegasus build`; for several of them see --data.mixture."""
    run_path: StoragePath = tyro.MISSING
    """Folder of this run: config, metrics, checkpoints, report."""
    heldout_path: StoragePath | None = None
    """Examples for the held-out loss; EXAMPLES_PATH/heldout if it exists."""
    start_from: StoragePath | None = None
    """Checkpoint or run whose parameters, optimizer and data position to continue."""
    reset_rows: bool = False
    """With --start-from and other examples: begin at their first row."""
    growth: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="STAGE… | SCHEDULE.json | none")] = None
    """Grow the model on the way: for each stage WHEN:TARGET[:PLAN.json], or all in one JSON file. WHEN is step=20000,
    or flat=0.002/3[,min_steps=5000] (the best held-out loss improved by less than 0.2 % over 3 evaluations). TARGET is
    a preset or sizes, as in `t5pegasus grow --to`, PLAN.json its --plan. Left out, a run that continues keeps its
    schedule; stages still ahead may be changed, or given up by: none."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelFlags = dataclasses.field(default_factory=ModelFlags)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainFlags = dataclasses.field(default_factory=TrainFlags)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)


def main(argv: list[str]) -> None:
    """Parse, train, print where the result lies."""
    with Attempt(["pretrain", *argv]) as attempt:
        _pretrain(argv, attempt)


def _pretrain(argv: list[str], attempt: Attempt) -> None:
    args = parse_command_line(Pretrain, prog="t5pegasus pretrain PRESET", absent=NO_FLAGS, **_defaults(argv))
    if args.reset_rows and args.start_from is None:
        raise UsageError("--reset-rows goes with --start-from CHECKPOINT: a fresh run begins at row 0 anyway")
    attempt.join(args.run_path, args.watch)
    from launch.growth_events import choose_stages, plan_events
    from t5pegasus.checkpoint import load_checkpoint_info
    from t5pegasus.data.shards import ExampleShards
    from t5pegasus.train.data_sources import fit_to_examples
    from t5pegasus.train.run import RunPaths, train_run

    examples_path = _choose_examples(args.examples_path, args.data)
    with ExampleShards(examples_path) as shards:
        manifest = shards.manifest
    model = ModelConfig(**dataclasses.asdict(args.model))
    train = TrainConfig(**dataclasses.asdict(args.train))
    config = RunConfig(model, args.data, args.optimizer, args.mesh, train)
    if args.start_from is None:
        config = fit_to_examples(config, manifest)
    paths = RunPaths(args.run_path, examples_path, args.heldout_path, args.start_from)
    events = plan_events(config, choose_stages(args.growth, args.run_path))
    facts = attempt_facts(config, paths) | {"growth": " ".join(event.plan_hash for event in events)}
    attempt.begin(facts)
    sampler = make_sampler(config, examples_path, args.heldout_path)
    checkpoint = train_run(
        config, paths, reset_rows=args.reset_rows, sampler=sampler, events=events, control=attempt.control
    )
    wider = f"d_model={load_checkpoint_info(checkpoint).config.model.d_model * 3 // 2}"
    grow = ["grow", args.run_path, "--to", wider, "--examples-path", examples_path]
    report_result(checkpoint, args.run_path, shlex.join(map(str, ["t5pegasus", *grow])))


def _choose_examples(examples_path: Path | None, data: DataConfig) -> Path:
    """The folder whose tokenizer the run has: the one given, or the first of a mixture."""
    folders = [open_path(folder) for folder in data.mixture_weights()]
    if not folders and examples_path is None:
        raise UsageError("give the examples: --examples-path FOLDER, or several by --data.mixture FOLDER=WEIGHT …")
    if folders and examples_path is not None and examples_path not in folders:
        raise UsageError(
            f"examples_path={examples_path} is none of the folders of --data.mixture; leave it out, or name it there "
            "with its weight"
        )
    return folders[0] if folders else cast(Path, examples_path)


def attempt_facts(config: RunConfig, paths: "RunPaths") -> dict[str, str]:
    """What must be the same in all processes of a job.

    Raises:
        UsageError: if the run path holds another artifact.
    """
    from t5pegasus.train.run_folder import check_run_path

    check_run_path(paths.run_path)
    groups = config.to_json().items()
    facts = {f"{group}.{field}": json.dumps(value) for group, fields in groups for field, value in fields.items()}
    return facts | {name: str(path) for name, path in paths.to_json().items()} | _fingerprints(config.data, paths)


def _fingerprints(data: DataConfig, paths: "RunPaths") -> dict[str, str]:
    """What is in each folder of examples: processes on several machines may each have their own under one name."""
    from t5pegasus.data.shard_files import MANIFEST
    from t5pegasus.train.data_sources import HELDOUT_FOLDER

    folders = [open_path(folder) for folder in data.mixture_weights()] or [paths.examples_path]
    heldout = [paths.heldout_path] if paths.heldout_path else [folder / HELDOUT_FOLDER for folder in folders]
    manifests = {folder: folder / MANIFEST for folder in (*folders, *heldout)}
    return {
        f"in {folder} the examples": str(read_json(path).get("fingerprint")) if path.is_file() else "none"
        for folder, path in manifests.items()
    }


def report_result(checkpoint: Path, run_path: Path, next_command: str) -> None:
    """Print the checkpoint, its held-out losses and what to do next, once per job."""
    import jax

    from t5pegasus.checkpoint import best_steps, find_last_good, load_checkpoint_info, verify_structure
    from t5pegasus.train.early_stopping import has_stopped

    if jax.process_index() != 0:
        return
    info = load_checkpoint_info(find_last_good(run_path, verify_structure) or checkpoint)
    if info.history:
        last_at = {entry["step"]: entry["loss"] for entry in info.history}  # a grown run begins with its source's step
        losses = ", ".join(f"{loss:.4f} at step {step}" for step, loss in list(last_at.items())[-3:])
        print(f"held-out loss: {losses}")
    train = info.config.train
    score = train.keep_best
    if score is not None and info.step < train.steps and has_stopped(train, info.history):
        print(f"stopped at step {info.step} of {train.steps}: {score} did not improve in {train.patience} evaluations")
    for entry in info.history:
        if score is not None and entry.get("best") and entry["step"] == best_steps(info.history)[-1]:
            percent = 100 if score == "accuracy" else 1  # the others are in percent already
            best = f"{entry[score]:.4f}" if score == "loss" else f"{percent * entry[score]:.2f} %"
            print(f"best {score}: {best} at step {entry['step']}; the run's name means this checkpoint")
    print(f"checkpoint: {checkpoint}")
    print(f"next: {next_command}   or: t5pegasus report {shlex.quote(str(run_path))}")


def _defaults(argv: list[str]) -> dict[str, Any]:
    """What tyro starts from: a preset, the config of the run to continue, or that of the checkpoint to start from."""
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if any(flag in argv for flag in ("-h", "--help")):
        config = preset(name or "base")
        return {"args": ["--help"], "default": _flags(config, {})}
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--run-path", "--start-from"):
        early.add_argument(flag, flag.replace("-", "_").replace("__", "--"), type=open_path)
    known, _ = early.parse_known_args(rest)
    config, paths = _choose_config(name, known.run_path, known.start_from)
    return {"args": rest, "default": _flags(config, paths)}


def _flags(config: RunConfig, paths: dict[str, Path]) -> Pretrain:
    fields: dict[str, Any] = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["model"] = ModelFlags(**dataclasses.asdict(config.model))
    fields["train"] = TrainFlags(**dataclasses.asdict(config.train))
    return Pretrain(**{**paths, **fields})


def _choose_config(
    name: str | None, run_path: Path | None, start_from: Path | None
) -> tuple[RunConfig, dict[str, Path]]:
    from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info, verify_structure
    from t5pegasus.train.run_folder import load_run_record

    record = load_run_record(run_path) if run_path is not None else None
    if name is None and record is not None:
        config, paths = record
        return config, {field: open_path(value) for field, value in paths.items() if value is not None}
    if start_from is not None:
        source = load_checkpoint_info(find_checkpoint(start_from, verify_structure)).config
        if name is None:
            return source, {}
        wanted = preset(name)
        grown = {field: getattr(source.optimizer, field) for field in ("rewarm_steps", "rewarm_peak", "schedule_shift")}
        optimizer = dataclasses.replace(wanted.optimizer, **grown)
        return dataclasses.replace(wanted, model=source.model, optimizer=optimizer), {}
    if name is None:
        raise UsageError(
            f"no preset given; begin with one of {', '.join(PRESETS)} (t5pegasus pretrain tiny …), "
            "or give --start-from CHECKPOINT"
        )
    return preset(name), {}
