"""The one training loop: pretraining, continuing after growth and fine-tuning are runs of it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.progress import Progress
from t5pegasus.train.early_stopping import History, has_stopped, judge
from t5pegasus.train.metrics import Meter, MetricsWriter
from t5pegasus.train.state import TrainState


class Hooks(NamedTuple):
    """What the loop calls but does not know: they bring data, held-out losses and disks."""

    evaluate: Callable[[TrainState], dict[str, float]] | None
    """State → {loss, accuracy, perhaps more scores} on held-out text; None where there is none."""
    save: Callable[[TrainState, History, int], None]
    """Write a checkpoint; the last argument is the FLOPs spent."""
    ends_phase: Callable[[int, History], bool] = lambda *_: False
    """(step, history) of the checkpoint just saved → whether the model changes here, so that the loop returns."""


def run(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Batch],
    config: RunConfig,
    hooks: Hooks,
    metrics: MetricsWriter,
    history: History = (),
    *,
    flops: int = 0,
    boundary: int | None = None,
    is_last_phase: bool = True,
) -> tuple[TrainState, History, int]:
    """Train until the state has made `config.train.steps` updates, `config.train.patience` runs out, or the phase ends.

    A checkpoint is saved at its intervals, at the end, and after each evaluation that is the best so far, if
    `config.train.keep_best` names what to be best at. Only behind a checkpoint may a phase end.

    The numbers of update n are read after update n + 1 is on its way, so the device does not wait for the host.

    Args:
        state: where to begin; it is consumed.
        train_step: the compiled update.
        batches: of the rows from `state.rows` on, already on the devices.
        config: steps, and the intervals of logging, evaluating and saving.
        hooks: evaluation and saving.
        metrics: receives a `train` record per logging interval and a `heldout` record per evaluation.
        history: evaluations so far.
        flops: spent so far on training this model and those it came from.
        boundary: one more step at which to save.
        is_last_phase: patience ends a run in its last phase only: before, a change of the model is still to come.

    Returns:
        The final state, the history and the FLOPs spent.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left as it was.
    """
    train = config.train
    meter = Meter(config, flops)

    def due(every_steps: int, step: int) -> bool:
        return step == train.steps or step % every_steps == 0

    def settle(step: int, values: dict[str, jax.Array]) -> None:
        meter.add(step, values)
        if due(train.log_every_steps, step):
            report(step)

    def report(step: int) -> None:
        record = meter.report()
        metrics.write("train", step, **record)
        progress.detail = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"

    step = int(state.step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    with Progress("train", total=train.steps, unit="steps", shown=jax.process_index() == 0) as progress:
        progress.skip(step)
        while step < train.steps:
            with meter.waiting():
                batch = next(batches)
            state, values = train_step(state, batch)
            step += 1
            if pending is not None:
                settle(*pending)
            pending = (step, values)
            progress.advance(1)
            evaluates = due(train.evaluate_every_steps, step)
            saves = step == boundary or due(train.save_every_steps, step)
            if not (evaluates or saves):
                continue
            settle(*pending)
            pending = None
            with meter.paused():
                if evaluates and hooks.evaluate:
                    heldout = hooks.evaluate(state)
                    metrics.write("heldout", step, **heldout)
                    history = (*history, judge(train, step, heldout, history))
                    saves |= history[-1].get("best", False)
                stops = is_last_phase and has_stopped(train, history)
                ends = saves and hooks.ends_phase(step, history)
                if ends and meter.steps:  # what is measured of one model is not mixed with the next one's
                    report(step)
                if saves or stops:
                    hooks.save(state, history, meter.flops)
            if stops or ends:
                break
    return state, history, meter.flops
