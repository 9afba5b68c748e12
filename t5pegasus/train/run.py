"""One run folder: where its weights and its config come from, and the loop with its data, losses and checkpoints."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import (
    CheckpointInfo,
    best_steps,
    find_checkpoint,
    finish_saves,
    remove_old_checkpoints,
    save_checkpoint,
)
from t5pegasus.config import SCHEMA, RunConfig, check_schema, read_json, write_json
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.errors import UsageError, reading
from t5pegasus.model.t5 import count_parameters
from t5pegasus.sharding import local_batch_rows, make_mesh, place_batch
from t5pegasus.train.early_stopping import History, forget_best, has_stopped, plain_entry
from t5pegasus.train.estimate import prepare_step
from t5pegasus.train.evaluation import Scorer, check_keep_best, make_evaluate
from t5pegasus.train.loop import Hooks, run
from t5pegasus.train.metrics import MetricsWriter, peak_flops
from t5pegasus.train.origin import find_origin
from t5pegasus.train.state import TrainState, state_to_arrays
from t5pegasus.train.step import make_train_step, resolve_compute_dtype

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    "mesh": ("data", "fsdp", "tensor"),
    "train": (
        "steps", "batch_size", "accumulation_steps", "log_every_steps", "evaluate_every_steps", "save_every_steps",
        "keep_checkpoints", "patience", "compute_dtype",
    ),
}  # fmt: skip
"""What may change when a run continues: the data position counts rows, so batch size is among them; a compute
dtype only if it is named (`find_origin`), and a run that stopped early may be given more patience."""


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """The artifacts a run reads and the folder it writes."""

    run_path: Path
    examples_path: Path
    heldout_path: Path | None = None
    """Examples for the held-out loss; None looks for `examples_path/heldout`."""
    start_from: Path | None = None
    """A checkpoint (trained, grown or converted), or a run folder whose last good one is meant."""

    def to_json(self) -> dict[str, str | None]:
        """Paths as text, for config.json and the metrics."""
        return {field: None if value is None else str(value) for field, value in dataclasses.asdict(self).items()}


def train_run(
    config: RunConfig,
    paths: RunPaths,
    *,
    keep_state: bool = True,
    reset_rows: bool = False,
    scorer: Scorer | None = None,
) -> Path:
    """Train in a run folder to the end; called again, it continues, or finds it finished.

    Args:
        config: the whole config; its model's vocabulary and token ids must be the tokenizer's (`fit_to_examples`).
        paths: what to read and where to write.
        keep_state: with `start_from`, continue its optimizer, step and data position (pretraining after growth);
            False takes its parameters only (fine-tuning).
        reset_rows: with `start_from` and other examples than it was trained on, begin at their first row.
        scorer: gives further scores at each evaluation, for `config.train.keep_best` to choose by.

    Returns:
        The folder of the best checkpoint where `config.train.keep_best` says what that is, else of the last one.

    Raises:
        UsageError: if the config contradicts the run folder, the checkpoint, the examples or the devices.
        ArtifactError: if one of the artifacts is missing or damaged.
        DivergedError: if the loss stops being finite.
    """
    mesh = make_mesh(config.mesh)
    train_step = make_train_step(config, mesh)
    compute_dtype = str(resolve_compute_dtype(config))
    record = load_run_record(paths.run_path)
    if record is not None:
        _check_resumable(record[0], config, paths.run_path)
    finish_saves(paths.run_path)
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context(_open_rows(paths.examples_path, config))
        shards = rows.shards
        _check_tokenizer(config, shards.manifest, paths.examples_path)
        heldout_rows = _open_heldout(paths, config, shards.manifest, stack)
        check_keep_best(config, scorer, has_heldout=heldout_rows is not None)
        origin = find_origin(
            config,
            paths.run_path,
            paths.start_from,
            mesh,
            shards.manifest,
            keep_state=keep_state,
            reset_rows=reset_rows,
        )
        step = origin.step
        if step >= config.train.steps and not origin.resumed:
            raise UsageError(
                f"checkpoint {paths.start_from} is at step {step}, train.steps={config.train.steps} leaves nothing to "
                "do; steps are counted from the beginning of training: give --train.steps a larger number"
            )
        stopped = origin.resumed and has_stopped(config.train, origin.history)
        if step >= config.train.steps or stopped:
            why = f", stopped early by train.patience={config.train.patience}" if stopped else ""
            logger.info("%s: finished, at step %d of %d%s", paths.run_path, step, config.train.steps, why)
            return find_checkpoint(paths.run_path)
        if origin.resumed:
            logger.info("%s: continues from its checkpoint of step %d", paths.run_path, step)
        if origin.resumed and record is not None:
            paths = _keep_start(paths, record[1]["start_from"])
        update, memory = prepare_step(config, mesh, train_step, step)
        _settle_run_folder(config, paths, resumed=origin.resumed)

        def save(state: TrainState, history: History) -> None:
            path = paths.run_path / "checkpoints" / str(int(state.step))
            info = CheckpointInfo(
                config=config,
                step=int(state.step),
                rows=int(state.rows),
                compute_dtype=compute_dtype,
                tokenizer_fingerprint=shards.manifest["tokenizer_fingerprint"],
                examples_fingerprint=shards.fingerprint,
                lineage=origin.lineage,
                history=history,
            )
            save_checkpoint(path, state_to_arrays(state), info, paths.run_path / "tokenizer")
            remove_old_checkpoints(paths.run_path, path, config.train.keep_checkpoints, best_steps(history)[-1:])

        batches = stack.enter_context(contextlib.closing(_device_batches(rows, config, mesh, origin.rows)))
        metrics = stack.enter_context(MetricsWriter(paths.run_path, from_step=step if origin.resumed else -1))
        peak, peak_source = peak_flops(jax.local_devices()[0])
        metrics.write(
            "start", step, config=config.to_json(), num_parameters=count_parameters(config.model),
            mesh=dict(mesh.shape), num_devices=jax.device_count(), device=jax.devices()[0].device_kind,
            peak_flops_per_device=peak, peak_source=peak_source, compute_dtype=compute_dtype,
            **dataclasses.asdict(memory), **paths.to_json(),
        )  # fmt: skip
        evaluate = None if heldout_rows is None else make_evaluate(heldout_rows, config, mesh, scorer)
        state, history = origin.load(), origin.history if origin.resumed else forget_best(origin.history)
        if evaluate is not None and not origin.resumed:  # after growth too: the loss right behind the seam
            first = evaluate(state)
            metrics.write("heldout", step, **first)
            history = (*history, plain_entry(config.train, step, first))
        run(state, update, batches, config, Hooks(evaluate, save), metrics, history)
    return find_checkpoint(paths.run_path)


def fit_to_examples(config: RunConfig, manifest: dict[str, Any]) -> RunConfig:
    """The config with the vocabulary size and the special ids of the examples' tokenizer."""
    model = dataclasses.replace(
        config.model,
        vocab_size=manifest["vocab_size"],
        pad_token_id=manifest["pad_id"],
        decoder_start_token_id=manifest["start_id"],
        eos_token_id=manifest["end_id"],
    )
    return dataclasses.replace(config, model=model)


def check_run_path(run_path: Path) -> None:
    """Refuse a folder that is another artifact: a run would be written into it.

    Raises:
        UsageError: naming the file that says so.
    """
    for mark in ("manifest.json", "tokenizer.json"):
        if (run_path / mark).is_file():
            raise UsageError(
                f"run path {run_path} is in use: {mark} says that it holds examples, a checkpoint or a tokenizer; "
                "choose another --run-path"
            )


def load_run_record(run_path: Path) -> tuple[RunConfig, dict[str, str | None]] | None:
    """Config and paths of an existing run folder, None if there is none.

    Raises:
        UsageError: if the folder is another artifact, or the record is of another schema.
        ArtifactError: if the record was changed.
    """
    check_run_path(run_path)
    record_path = run_path / "config.json"
    if not record_path.exists():
        return None
    record = read_json(record_path)
    check_schema(record, record_path)
    with reading(record_path):
        paths = {name: record[name] for name in ("examples_path", "heldout_path", "start_from")}
        return RunConfig.from_json(record["config"]), paths


def _settle_run_folder(config: RunConfig, paths: RunPaths, *, resumed: bool) -> None:
    """Write what the run is made of; what an earlier try left that never saved a checkpoint is replaced."""
    if jax.process_index() != 0:
        return
    tokenizer, unfinished = paths.run_path / "tokenizer", paths.run_path / "tokenizer.unfinished"
    paths.run_path.mkdir(parents=True, exist_ok=True)
    if not (resumed and tokenizer.exists()):
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(paths.examples_path / "tokenizer", unfinished)
        shutil.rmtree(tokenizer, ignore_errors=True)
        unfinished.rename(tokenizer)
    write_json(paths.run_path / "config.json", {"schema": SCHEMA, "config": config.to_json(), **paths.to_json()})


def _keep_start(paths: RunPaths, begun_from: str | None) -> RunPaths:
    """The paths with the checkpoint the run really began from, whichever is given now."""
    begun = None if begun_from is None else Path(begun_from)
    if paths.start_from is not None and (begun is None or begun.resolve() != paths.start_from.resolve()):
        logger.warning(
            "%s continues from its own checkpoint; it was begun from %s, so %s is not used: "
            "choose another --run-path to start from it",
            paths.run_path, begun or "fresh parameters", paths.start_from,
        )  # fmt: skip
    return dataclasses.replace(paths, start_from=begun)


def _check_resumable(before: RunConfig, now: RunConfig, run_path: Path) -> None:
    old, new = before.to_json(), now.to_json()
    for group, fields in new.items():
        for field, value in fields.items():
            if field not in FREE_ON_RESUME.get(group, ()) and old[group][field] != value:
                raise UsageError(
                    f"{run_path} was begun with {group}.{field}={old[group][field]!r}, got {value!r}; "
                    "to continue it give the same preset and flags as before; or choose another --run-path"
                )


def _check_tokenizer(config: RunConfig, manifest: dict[str, Any], examples_path: Path) -> None:
    wanted = fit_to_examples(config, manifest).model
    for field in ("vocab_size", "pad_token_id", "decoder_start_token_id", "eos_token_id"):
        if getattr(config.model, field) != getattr(wanted, field):
            raise UsageError(
                f"model.{field}={getattr(config.model, field)} differs from {getattr(wanted, field)} of the tokenizer "
                f"in {examples_path}; build the examples with the tokenizer in the checkpoint's folder"
            )


def _open_heldout(
    paths: RunPaths, config: RunConfig, manifest: dict[str, Any], stack: contextlib.ExitStack
) -> PackedRows | None:
    """The rows for the held-out loss, None if there are none; of the same tokenizer as those to train on."""
    path = paths.heldout_path or paths.examples_path / "heldout"
    if paths.heldout_path is None and not path.exists():
        return None
    rows = stack.enter_context(_open_rows(path, config))
    got, wanted = (each["tokenizer_fingerprint"] for each in (rows.shards.manifest, manifest))
    if got != wanted:
        raise UsageError(
            f"tokenizer of the held-out examples {path} is {got}, that of {paths.examples_path} is {wanted}; "
            "build both with the same --tokenizer-path"
        )
    return rows


def _open_rows(examples_path: Path, config: RunConfig) -> PackedRows:
    model = config.model
    num_open = model.num_open_tokens if model.num_masked_tokens else None
    return PackedRows(
        examples_path, config.data, model.pad_token_id, model.decoder_start_token_id, num_open_tokens=num_open
    )


def _device_batches(rows: PackedRows, config: RunConfig, mesh: Mesh, start_row: int) -> Generator[Batch]:
    batch_size = config.train.batch_size
    mine = local_batch_rows(batch_size, mesh)
    with contextlib.closing(load_batches(rows, batch_size, start_row, batch_rows=mine)) as batches:
        for batch in batches:
            yield place_batch(batch, mine, batch_size, mesh)
