"""One run folder: where its weights and its config come from, and the loop with its data, losses and checkpoints."""

import contextlib
import functools
import logging
from collections.abc import Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import (
    CheckpointInfo,
    CheckpointWriter,
    DamagedError,
    Retention,
    best_steps,
    find_checkpoint,
    finish_saves,
    verify_structure,
    verify_together,
)
from t5pegasus.config import RunConfig, TrainConfig
from t5pegasus.data.loader import load_batches
from t5pegasus.data.mixed_rows import MixedRows
from t5pegasus.errors import DivergedError, PreemptedError, UsageError
from t5pegasus.sharding import local_batch_rows, make_mesh, place_batch
from t5pegasus.storage import Claim, working_copy
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.control import Control
from t5pegasus.train.course import Course
from t5pegasus.train.data_sources import GivenExamples, open_data
from t5pegasus.train.divergence import RollbackNeededError
from t5pegasus.train.early_stopping import has_stopped
from t5pegasus.train.estimate import prepare_step
from t5pegasus.train.evaluation import Sampler, Scorer, check_keep_best, check_samples, make_evaluate, make_sample
from t5pegasus.train.goodput import Goodput
from t5pegasus.train.origin import Origin, find_origin
from t5pegasus.train.phases import Event, next_event, phase_end
from t5pegasus.train.profiler import Profiler
from t5pegasus.train.run_folder import (
    RunPaths,
    check_record,
    keep_start,
    load_recorded_events,
    load_run_record,
    settle_run_folder,
)
from t5pegasus.train.seam import Measurement, Phase, Run, check_events, train_phases
from t5pegasus.train.start_records import go_back, open_metrics, write_rollbacks, write_start
from t5pegasus.train.state import TrainState, state_to_arrays
from t5pegasus.train.step import make_train_step

logger = logging.getLogger(__name__)

_COMMON_ERRORS = (RollbackNeededError, DamagedError, DivergedError, PreemptedError)
"""All processes of a job raise them at the same place."""
_SEAM_ROWS = 64
"""On which to compare the models around an event, where nothing is held out."""


def train_run(
    config: RunConfig,
    paths: RunPaths,
    *,
    keep_state: bool = True,
    reset_rows: bool = False,
    scorer: Scorer | None = None,
    sampler: Sampler | None = None,
    events: Sequence[Event] = (),
    control: Control | None = None,
) -> Path:
    """Train in a run folder to the end; called again, it continues, or finds it finished.

    Args:
        config: the whole config; its model's vocabulary and token ids must be the tokenizer's
            (`data_sources.fit_to_examples`).
        paths: what to read and where to write.
        keep_state: with `start_from`, continue its optimizer, step and data position (pretraining after growth);
            False takes its parameters only (fine-tuning).
        reset_rows: with `start_from` and other examples than it was trained on, begin at their first row.
        scorer: gives further scores at each evaluation, for `config.train.keep_best` to choose by.
        sampler: writes summaries of held-out sources, where `config.train.sample_every_steps` asks for them.
        events: what changes the model on the way, in order; `config` is that of the run before all of them.
        control: through which signal handlers and watchers ask the run to stop or to save, and see what it does.

    Returns:
        The folder of the best checkpoint where `config.train.keep_best` says what that is, else of the last one.

    Raises:
        UsageError: if the config, or that of a later phase, contradicts the run folder, the checkpoint, the examples
            or the devices.
        ArtifactError: if one of the artifacts is missing or damaged, or an event does not keep its promise.
        DivergedError: if an update is bad, and `config.train.on_divergence` does not go on.
        PreemptedError: if the run was asked to stop, once what it has done is saved.
        TakenOverError: if another job was begun in the run folder; nothing of its work is changed.
    """
    control, damaged = control or Control(), set[Path]()
    rollbacks: list[dict[str, Any]] = []
    goodput = Goodput()
    claim = Claim(paths.run_path) if jax.process_index() == 0 else None
    try:
        while True:
            try:
                return _train(
                    config, paths, keep_state=keep_state, reset_rows=reset_rows, scorer=scorer, sampler=sampler,
                    events=events, control=control, damaged=damaged, rollbacks=rollbacks, goodput=goodput, claim=claim,
                )  # fmt: skip
            except RollbackNeededError as error:
                rollbacks.append(error.record)
            except DamagedError as error:  # what was found when its arrays were read
                runs = {run / "checkpoints" for run in (paths.run_path, paths.start_from) if run is not None}
                if error.path.parent not in runs or error.path in damaged:
                    raise
                logger.warning("%s; going back to the one before", error)
                damaged.add(error.path)
                rollbacks.clear()  # from further back they are made again
    finally:
        if claim is not None and control.first_step is None:
            claim.withdraw()


def _train(
    config: RunConfig,
    paths: RunPaths,
    *,
    keep_state: bool,
    reset_rows: bool,
    scorer: Scorer | None,
    sampler: Sampler | None,
    events: Sequence[Event],
    control: Control,
    damaged: Collection[Path],
    rollbacks: Sequence[dict[str, Any]],
    goodput: Goodput,
    claim: Claim | None,
) -> Path:
    """`train_run`, without the checkpoints that are known to be damaged, and behind the rows of bad updates."""
    mesh = make_mesh(config.mesh)
    record = load_run_record(paths.run_path)
    check_record(record and record[0], config, paths.run_path)
    with contextlib.ExitStack() as stack:
        rows, heldout_rows = open_data(paths.examples_path, paths.heldout_path, config, stack)
        check_keep_best(config, scorer, has_heldout=heldout_rows is not None)
        check_samples(config, sampler, has_heldout=heldout_rows is not None)
        _take_over(paths.run_path, claim)
        with control.doing("restore"):
            origin = find_origin(
                config,
                paths.run_path,
                paths.start_from,
                mesh,
                GivenExamples(rows.shards.path, rows.shards.manifest, rows.weights),
                keep_state=keep_state,
                reset_rows=reset_rows,
                events=events,
                recorded_events=load_recorded_events(paths.run_path),
                damaged=damaged,
            )
        rows.follow(origin.mixture)
        rows.recall(origin.course.bad_examples)
        train, step = config.train, origin.step
        rollbacks = [record for record in rollbacks if record["rollback"] > origin.course.rollbacks]
        course, start_row = go_back(origin, rollbacks)
        train_step = make_train_step(origin.config, mesh)
        if step >= train.steps and not origin.resumed:
            raise UsageError(
                f"checkpoint {paths.start_from} is at step {step}, train.steps={train.steps} leaves nothing to "
                "do; steps are counted from the beginning of training: give --train.steps a larger number"
            )
        stopped = origin.resumed and not next_event(events, origin.lineage) and has_stopped(train, course.history)
        if (step >= train.steps or stopped) and not course.owed:
            return _finished(paths.run_path, origin, train, damaged, stopped=stopped)
        check_events(origin.config, events, origin.lineage, mesh, has_heldout=heldout_rows is not None)
        if origin.resumed and record is not None:
            paths = keep_start(paths, record[1]["start_from"])
        last_step = phase_end(events, origin.lineage, origin.config, step)
        with control.doing("compile"):
            update, memory = prepare_step(
                origin.config, mesh, train_step, step, last_step, tells=not damaged and not rollbacks
            )
        settle_run_folder(config, paths, events, resumed=origin.resumed)
        batches = stack.enter_context(contextlib.closing(_device_batches(rows, config, mesh, start_row)))
        folder = stack.enter_context(working_copy(paths.run_path, claim))
        metrics = stack.enter_context(open_metrics(folder.path, paths, origin))
        if metrics.writes:
            stack.push(goodput.begin(folder.path, step, control))
            goodput.lose(metrics.dropped, step)
        write_rollbacks(metrics, rollbacks, origin)
        write_start(metrics, paths, origin.config, step, mesh, memory)
        profiler = Profiler(train, folder.path / "profile")
        stack.callback(profiler.stop)
        writer = stack.enter_context(
            CheckpointWriter(paths.run_path, control.part_seconds, folder.push, common_errors=_COMMON_ERRORS)
        )
        stack.enter_context(_unhurried(control))
        run = Run(
            events=events,
            mesh=mesh,
            batches=batches,
            find_bad_examples=rows.find_bad_examples,
            metrics=metrics,
            measurement=_measure_seams(rows, heldout_rows, mesh),
            make_evaluate=lambda config: heldout_rows and make_evaluate(heldout_rows, config, mesh, scorer),
            make_sample=lambda config: make_sample(sampler, config),
            save=functools.partial(_save, writer, rows),
            finish_saves=writer.finish,
            control=control,
            profiler=profiler,
            goodput=goodput,
            checkpoints_path=paths.run_path / "checkpoints",
        )
        with control.doing("restore"):
            state = origin.load()
            if origin.resumed:  # known only now, since its arrays may have turned out to be damaged
                logger.info("%s: continues from its checkpoint of step %d", paths.run_path, step)
            state = state._replace(rows=jax.device_put(np.uint32(start_row), state.rows.sharding))
        phase = Phase(origin.config, origin.lineage, course)
        train_phases(run, state, phase, update, origin.path, begins=not origin.resumed)
    return find_checkpoint(paths.run_path, verify_structure)  # its arrays have just been written


def _take_over(run_path: Path, claim: Claim | None) -> None:
    """Make the run this job's, and only then bring in order what an earlier one has left there."""
    if claim is not None:
        claim.take()
    finish_saves(run_path)


@contextlib.contextmanager
def _unhurried(control: Control) -> Iterator[None]:
    """Behind an error that all processes raise none waits for one that is gone: the way out may take its time."""
    try:
        yield
    except _COMMON_ERRORS:
        control.failing = None
        raise


def _finished(run_path: Path, origin: Origin, train: TrainConfig, damaged: Collection[Path], *, stopped: bool) -> Path:
    """The checkpoint of a run that has nothing left to do.

    Raises:
        DamagedError: if its last one is not whole, and so to be made again: nothing has read its arrays yet.
    """
    if origin.resumed and origin.path is not None:
        verify_together(origin.path)
    why = f", stopped early by train.patience={train.patience}" if stopped else ""
    logger.info("%s: finished, at step %d of %d%s", run_path, origin.step, train.steps, why)
    return find_checkpoint(run_path, verify_structure, damaged)


def _save(writer: CheckpointWriter, rows: MixedRows, phase: Phase, state: TrainState, course: Course) -> None:
    """Begin a checkpoint; beside the last ones stay the best one, and those that an event changed the model behind."""
    info = CheckpointInfo(
        config=phase.config,
        step=int(state.step),
        rows=int(state.rows),
        compute_dtype=str(resolve_compute_dtype(phase.config)),
        tokenizer_fingerprint=rows.shards.manifest["tokenizer_fingerprint"],
        examples_fingerprint=rows.shards.fingerprint,
        mixture=tuple(change.to_json() for change in rows.changes),
        lineage=phase.lineage,
        history=course.history,
        flops=course.flops,
        course=course.to_json(),
    )
    train = phase.config.train
    kept_steps = frozenset({*best_steps(course.history)[-1:], *(entry["step"] for entry in phase.lineage)})
    writer.save(state_to_arrays(state), info, Retention(train.keep_checkpoints, train.keep_every_steps, kept_steps))


def _measure_seams(rows: MixedRows, heldout_rows: MixedRows | None, mesh: Mesh) -> Measurement:
    """By all of the held-out rows, or, where there are none, by some of those trained on."""
    if heldout_rows is not None:
        return Measurement(
            lambda config: make_evaluate(heldout_rows, config, mesh, None),
            str(heldout_rows.shards.path),
            heldout_rows.num_rows,
            is_heldout=True,
        )
    num_rows = min(rows.num_rows, _SEAM_ROWS)
    return Measurement(
        lambda config: make_evaluate(rows, config, mesh, None, num_rows),
        f"the first {num_rows} rows of {rows.shards.path}",
        num_rows,
        is_heldout=False,
    )


def _device_batches(rows: MixedRows, config: RunConfig, mesh: Mesh, start_row: int) -> Generator[Batch]:
    batch_size = config.train.batch_size
    mine = local_batch_rows(batch_size, mesh)
    with contextlib.closing(load_batches(rows, batch_size, start_row, batch_rows=mine)) as batches:
        for batch in batches:
            yield place_batch(batch, mine, batch_size, mesh)
