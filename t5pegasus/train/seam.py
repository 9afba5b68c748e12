"""The phases of a run and the seams between them: events are checked before the run, and carried out in between."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import MANIFEST
from t5pegasus.config import RunConfig
from t5pegasus.data.quarantine import BadExample
from t5pegasus.errors import PreemptedError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.model.t5 import count_parameters
from t5pegasus.train import loop
from t5pegasus.train.agreement import Agreement, Check, StopAgreedError, make_check
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.control import Control
from t5pegasus.train.course import Course
from t5pegasus.train.early_stopping import plain_entry
from t5pegasus.train.estimate import abstract_state, check_state_fits, prepare_step
from t5pegasus.train.evaluation import Evaluate
from t5pegasus.train.goodput import Goodput
from t5pegasus.train.logbook import Logbook
from t5pegasus.train.metrics import MetricsWriter, count_flops
from t5pegasus.train.phases import Event, Lineage, due_event, next_event, phase_end
from t5pegasus.train.profiler import Profiler
from t5pegasus.train.state import TrainState
from t5pegasus.train.step import make_train_step
from t5pegasus.train.visit import Hooks, Outside, is_boundary

logger = logging.getLogger(__name__)

OF_THE_EXAMPLES = ("vocab_size", "num_masked_tokens", "pad_token_id", "decoder_start_token_id", "eos_token_id")
"""What a run cannot change, because its examples are written in them."""

_Scores = Mapping[str, Mapping[str, float]]
"""Of the parameters and of their moving average: scores by name."""


class Phase(NamedTuple):
    """What a run knows of the model it is training now."""

    config: RunConfig
    lineage: Lineage
    course: Course


class Measurement(NamedTuple):
    """How losses on both sides of a seam are measured."""

    make: Callable[[RunConfig], Evaluate]
    """Config → function of the state that gives its scores."""
    evidence: str
    """What they are measured on."""
    num_rows: int
    is_heldout: bool


class Run(NamedTuple):
    """What a run is done with, whichever phase it is in."""

    events: Sequence[Event]
    """All of the schedule."""
    mesh: Mesh
    batches: Iterator[Batch]
    """Of the rows that the state has not consumed yet, on the mesh."""
    find_bad_examples: Callable[[Sequence[int]], list[BadExample]]
    """Rows of the stream → the examples among them that cannot be used."""
    metrics: MetricsWriter
    measurement: Measurement
    make_evaluate: Callable[[RunConfig], Evaluate | None]
    """Config → what evaluates its models, None where nothing is held out."""
    make_sample: Callable[[RunConfig], Callable[[TrainState, Check], list[dict[str, Any]]] | None]
    """Config → what writes samples of its models, None where none are wanted."""
    save: Callable[[Phase, TrainState, Course], None]
    """Writes a checkpoint."""
    finish_saves: Callable[[], None]
    """Waits until all checkpoints are on the disk."""
    control: Control
    """What the process asks of the run."""
    profiler: Profiler
    goodput: Goodput
    checkpoints_path: Path
    """Where that puts it, under its step."""


def check_events(
    config: RunConfig, events: Sequence[Event], lineage: Lineage, mesh: Mesh, *, has_heldout: bool
) -> None:
    """Refuse, before anything is trained, an event that this run could not carry out or never would.

    Args:
        config: of the run now.
        events: all of the schedule; those in `lineage` are passed over.
        lineage: of the state that the run continues from.
        mesh: where to train.
        has_heldout: whether held-out losses are measured.

    Raises:
        UsageError: naming the event.
    """
    shown = logging.INFO if jax.process_index() == 0 else logging.DEBUG
    while (event := next_event(events, lineage)) is not None:
        if event.needs_heldout and not has_heldout:
            raise UsageError(
                f"{event.name} is decided by held-out losses, and there are no held-out examples; give --heldout-path, "
                "or a stage at a step: step=N"
            )
        if event.at_step is not None and event.at_step >= config.train.steps:
            raise UsageError(
                f"{event.name} is not before the end of the run, train.steps={config.train.steps}; "
                f"choose an earlier step, or more steps: --train.steps {2 * event.at_step}"
            )
        changed = event.change_config(config, event.at_step or 0)
        for field in OF_THE_EXAMPLES:
            if getattr(changed.model, field) != getattr(config.model, field):
                raise UsageError(
                    f"{event.name} changes model.{field}, and the run's examples are written in the tokens they have; "
                    "grow the vocabulary between two runs: t5pegasus grow, then pretrain --start-from"
                )
        try:
            make_train_step(changed, mesh)
            state = abstract_state(changed, mesh)
        except UsageError as error:
            raise UsageError(f"{event.name}: {error}") from None
        config = changed
        logger.log(shown, "%s: %s parameters", event.name, f"{count_parameters(config.model):,}")
        check_state_fits(state, f"{event.name}: the training state takes")
        lineage = (*lineage, {"plan_hash": event.plan_hash, "step": event.at_step or 0})


def train_phases(
    run: Run,
    state: TrainState,
    phase: Phase,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    source: Path | None,
    *,
    begins: bool,
) -> None:
    """Train to the end of the run, with the events on the way.

    Args:
        run: what it is done with.
        state: where to begin; consumed.
        phase: what is known of it.
        train_step: the compiled update of its config.
        source: its checkpoint, None for fresh parameters.
        begins: whether the run is new, so that its first held-out loss is that of the weights it begins with.

    Raises:
        ArtifactError: if an event does not keep its promise.
        DivergedError: if the loss stops being finite.
    """
    evaluate, step = run.make_evaluate(phase.config), int(state.step)
    if evaluate is not None and begins:  # after growth too: the loss right behind the seam
        with run.control.doing("evaluate", step), _stoppable(run):
            first = evaluate(state, make_check(Agreement(run.mesh), run.control))
        run.metrics.write("heldout", step, **first)
        history = phase.course.history
        entry = plain_entry(phase.config.train, step, first, begins_phase=bool(history))
        phase = phase._replace(course=phase.course._replace(history=(*history, entry)))
    event = _find_due(run, phase, step) if begins or _may_change(run, phase, step) else None
    while True:
        if event is not None:
            with run.control.doing("event", step), _stoppable(run):
                state, phase = _change(run, event, state, phase, cast(Path, source))
            last_step = phase_end(run.events, phase.lineage, phase.config, step)
            with run.control.doing("compile", step):
                train_step, _ = prepare_step(
                    phase.config, run.mesh, make_train_step(phase.config, run.mesh), step, last_step
                )
            evaluate = run.make_evaluate(phase.config)
        state, phase = _train_phase(run, state, phase, train_step, evaluate)
        step, source = int(state.step), run.checkpoints_path / str(int(state.step))
        event = _find_due(run, phase, step)
        if event is None:
            return


def _find_due(run: Run, phase: Phase, step: int) -> Event | None:
    return due_event(run.events, phase.lineage, phase.config, step, phase.course.history)


def _may_change(run: Run, phase: Phase, step: int) -> bool:
    """Whether a run that continues from here would have changed its model here, had it not been stopped.

    It may have been saved where it otherwise does not save, or before it was evaluated.
    """
    upcoming = next_event(run.events, phase.lineage)
    boundary = upcoming and upcoming.at_step
    return not phase.course.owed and is_boundary(phase.config, step, phase.course.history, boundary)


@contextlib.contextmanager
def _stoppable(run: Run) -> Iterator[None]:
    """Work between two updates that is pure, and done again by the run that continues: a stop saves nothing."""
    try:
        yield
    except StopAgreedError:
        run.finish_saves()
        raise PreemptedError("asked to stop: the last checkpoint is intact; the same command goes on") from None


def _change(run: Run, event: Event, state: TrainState, phase: Phase, source: Path) -> tuple[TrainState, Phase]:
    check = make_check(Agreement(run.mesh), run.control)
    before = _measure(run.measurement.make(phase.config), state, check)
    began = time.perf_counter()
    # No other name may hold the state, or both models stay in memory.
    state = jax.block_until_ready(event.change_state(state, run.mesh))
    return state, _judge_seam(run, event, before, state, phase, source, time.perf_counter() - began, check)


def _train_phase(
    run: Run, state: TrainState, phase: Phase, train_step: Any, evaluate: Evaluate | None
) -> tuple[TrainState, Phase]:
    due = functools.partial(due_event, run.events, phase.lineage, phase.config)
    hooks = Hooks(
        evaluate,
        functools.partial(run.save, phase),
        run.finish_saves,
        ends_phase=lambda step, history: due(step, history) is not None,
        sample=run.make_sample(phase.config),
        find_bad_examples=run.find_bad_examples,
    )
    upcoming = next_event(run.events, phase.lineage)
    logbook = Logbook(phase.config, run.metrics, run.control, run.goodput, phase.course)
    outside = Outside(run.control, Agreement(run.mesh), run.profiler)
    state, course = loop.run(
        state, train_step, run.batches, phase.config, hooks, logbook, outside, phase.course,
        boundary=upcoming and upcoming.at_step, is_last_phase=upcoming is None,
    )  # fmt: skip
    return state, phase._replace(course=course)


def _judge_seam(
    run: Run, event: Event, before: _Scores, state: TrainState, phase: Phase, source: Path, seconds: float,
    check: Check,
) -> Phase:  # fmt: skip
    """Measure the state behind an event, hold it against what was before, record all that; the phase that begins."""
    step, config = int(state.step), event.change_config(phase.config, int(state.step))
    if jax.process_index() == 0:
        logger.info("%s: at step %d, in %.1f s", event.name, step, seconds)
    _check_shapes(event, state, config, run.mesh)
    after = _measure(run.measurement.make(config), state, check)
    compute_dtype = str(resolve_compute_dtype(config))
    for weights, scores in after.items():
        event.check(before[weights]["loss"], scores["loss"], compute_dtype)
    own_flops = _forward_flops(phase.config, config, run.measurement.num_rows * len(after))
    evaluated = "ema" if "ema" in after else "parameters"
    run.metrics.write(
        event.kind, step, plan_hash=event.plan_hash, name=event.name, **event.facts,
        parameters_before=count_parameters(phase.config.model), parameters_after=count_parameters(config.model),
        evidence=run.measurement.evidence, loss_before=before[evaluated]["loss"], loss_after=after[evaluated]["loss"],
        source_flops=phase.course.flops, own_flops=own_flops, flops=phase.course.flops + own_flops, seconds=seconds,
        config=config.to_json(),
    )  # fmt: skip
    history = phase.course.history
    if run.measurement.is_heldout:
        run.metrics.write("heldout", step, **after[evaluated])
        history = (*history, plain_entry(config.train, step, after[evaluated], begins_phase=True))
    entry = {
        **event.entry,
        "plan_hash": event.plan_hash,
        "source_fingerprint": read_json(source / MANIFEST)["fingerprint"],
        "step": step,
    }
    course = phase.course._replace(history=history, flops=phase.course.flops + own_flops)
    return Phase(config, (*phase.lineage, entry), course)


def _measure(evaluate: Evaluate, state: TrainState, check: Check) -> _Scores:
    """Scores of the parameters and, where there is one, of their moving average: the event changed both."""
    scores = {"parameters": evaluate(state._replace(ema={}), check)}
    return scores | {"ema": evaluate(state, check)} if state.ema else scores


def _check_shapes(event: Event, state: TrainState, config: RunConfig, mesh: Mesh) -> None:
    def is_as(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
        same = (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        return same and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)

    if not all(jax.tree.leaves(jax.tree.map(is_as, state, abstract_state(config, mesh)))):
        raise AssertionError(f"{event.name} made a state that is not of its config")


def _forward_flops(before: RunConfig, after: RunConfig, num_rows: int) -> int:
    """FLOPs of measuring both sides of a seam: a forward pass is a third of training. The rest has no products."""
    return (count_flops(before, num_rows) + count_flops(after, num_rows)) // 3
