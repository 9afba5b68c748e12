"""The one training loop: pretraining, continuing after growth and fine-tuning are runs of it."""

from collections.abc import Callable, Iterator

import jax

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.train.control import Request
from t5pegasus.train.course import Course
from t5pegasus.train.logbook import Logbook
from t5pegasus.train.state import TrainState
from t5pegasus.train.visit import NOTHING, Hooks, Outside, Visit

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def run(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[Batch],
    config: RunConfig,
    hooks: Hooks,
    logbook: Logbook,
    outside: Outside,
    course: Course,
    *,
    boundary: int | None = None,
    is_last_phase: bool = True,
) -> tuple[TrainState, Course]:
    """Train until the state has made `config.train.steps` updates, `config.train.patience` runs out, or the phase ends.

    A checkpoint is saved at its intervals, at the end, and after each evaluation that is the best so far, if
    `config.train.keep_best` names what to be best at. Only behind such a checkpoint may a phase end.

    The numbers of update n are read after update n + 1 is on its way, so the device does not wait for the host.

    Args:
        state: where to begin; it is consumed.
        train_step: the compiled update.
        batches: of the rows from `state.rows` on, already on the devices.
        config: steps, and the intervals of logging, evaluating, sampling and saving.
        hooks: evaluation, samples and saving.
        logbook: receives what is measured.
        outside: requests.
        course: so far; what a stop cut off at this step is made up for first.
        boundary: one more step at which to save.
        is_last_phase: patience ends a run in its last phase only: before, a change of the model is still to come.

    Returns:
        The final state and course.

    Raises:
        DivergedError: if the run is to end with a bad update; the last checkpoint is left as it was.
        RollbackNeededError: if the run is to go back behind a bad update.
        PreemptedError: if the run was asked to stop, once what it has done is saved.
    """
    train, (control, agreement, profiler) = config.train, outside
    visit = Visit(config, hooks, logbook, outside, course, boundary=boundary, is_last_phase=is_last_phase)
    step = int(state.step)
    with control.doing("step", step), logbook.progress(step):
        ended = bool(course.owed) and visit(state, step, course.owed)
        known, done = agreement.ask(control.requests), NOTHING
        while step < train.steps and not ended:
            if profiler.begins(step + 1):
                visit.settle()
                profiler.start(step + 1)
            with control.doing("data", step):
                batch = next(batches)
            visit.remind()
            state, values = train_step(state, batch)
            asked, known = known, agreement.ask(control.requests)
            step += 1
            with control.doing("device", step):
                visit.settle()
                agreed = agreement.read(asked) & ~done  # it was still asked for when it was being done
            visit.pending = step, values
            logbook.advance()
            if profiler.ends(step):
                visit.settle()
                profiler.stop()
            done = agreed & (Request.SAVE | Request.PROFILE)
            control.answer(done)
            if Request.PROFILE in agreed:
                profiler.ask(step)
            due = visit.due(step)
            if due or visit.saves(step) or agreed & (Request.SAVE | Request.STOP):
                with control.doing("device", step):
                    visit.settle()
                ended = visit(state, step, due, agreed)
        with control.doing("save", step):
            hooks.finish_saves()
    return state, visit.course
