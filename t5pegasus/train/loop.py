"""The one training loop: pretraining, continuing after growth and fine-tuning are runs of it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.errors import PreemptedError
from t5pegasus.progress import Progress
from t5pegasus.train.agreement import Agreement
from t5pegasus.train.control import Control, Request
from t5pegasus.train.early_stopping import History, has_stopped, judge
from t5pegasus.train.metrics import Meter, MetricsWriter
from t5pegasus.train.state import TrainState


class Hooks(NamedTuple):
    """What the loop calls but does not know: they bring data, held-out losses and disks."""

    evaluate: Callable[[TrainState], dict[str, float]] | None
    """State → {loss, accuracy, perhaps more scores} on held-out text; None where there is none."""
    save: Callable[[TrainState, History, int], None]
    """Write a checkpoint; the last argument is the FLOPs spent. It may still be writing when it returns, but has no
    more need of the state, and raises what an earlier save failed of."""
    finish_saves: Callable[[], None] = lambda: None
    """Wait until all checkpoints are on the disk."""
    ends_phase: Callable[[int, History], bool] = lambda *_: False
    """(step, history) of the checkpoint just saved → whether the model changes here, so that the loop returns."""


class _Loop:
    """The loop's parts, which share what it knows: the history, the meter and the update that is on its way."""

    def __init__(self, config: RunConfig, hooks: Hooks, metrics: MetricsWriter, control: Control, meter: Meter):
        self.train, self.hooks, self.metrics = config.train, hooks, metrics
        self.control, self.meter = control, meter
        self.history: History = ()
        self.is_last_phase = True
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.progress = Progress("train", total=self.train.steps, unit="steps", shown=jax.process_index() == 0)

    def due(self, every_steps: int, step: int) -> bool:
        """Whether a step is one of these, or the last."""
        return step == self.train.steps or step % every_steps == 0

    def settle(self) -> None:
        """Read the numbers of the update that is on its way, waiting for the device to have them."""
        if self.pending is not None:
            (step, values), self.pending = self.pending, None
            self.meter.add(step, values)
            if self.due(self.train.log_every_steps, step):
                self.report(step)

    def report(self, step: int) -> None:
        """Write what was measured since the last report."""
        record = self.meter.report()
        self.metrics.write("train", step, **record)
        self.progress.detail = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"

    def visit(self, state: TrainState, step: int, *, evaluates: bool, saves: bool) -> bool:
        """Evaluate and save as asked; whether the run, or its phase, ends here."""
        if evaluates and self.hooks.evaluate:
            with self.control.doing("evaluate", step):
                heldout = self.hooks.evaluate(state)
            self.metrics.write("heldout", step, **heldout)
            self.history = (*self.history, judge(self.train, step, heldout, self.history))
            saves |= self.history[-1].get("best", False)
        stops = self.is_last_phase and has_stopped(self.train, self.history)
        ends = saves and self.hooks.ends_phase(step, self.history)
        if ends and self.meter.steps:  # what is measured of one model is not mixed with the next one's
            self.report(step)
        if saves or stops:
            with self.control.doing("save", step):
                self.hooks.save(state, self.history, self.meter.flops)
        return stops or ends


def run(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Batch],
    config: RunConfig,
    hooks: Hooks,
    metrics: MetricsWriter,
    history: History = (),
    *,
    control: Control,
    agreement: Agreement,
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
        control: what the process asks of the run.
        agreement: of all processes on that.
        flops: spent so far on training this model and those it came from.
        boundary: one more step at which to save.
        is_last_phase: patience ends a run in its last phase only: before, a change of the model is still to come.

    Returns:
        The final state, the history and the FLOPs spent.

    Raises:
        DivergedError: if the loss is not finite; the last checkpoint is left as it was.
        PreemptedError: if the run was asked to stop, once what it has done is saved.
    """
    train = config.train
    loop = _Loop(config, hooks, metrics, control, Meter(config, flops))
    loop.history, loop.is_last_phase = history, is_last_phase
    step = int(state.step)
    known = agreement.ask(control.requests)
    with loop.progress as progress:
        progress.skip(step)
        while step < train.steps:
            with control.doing("data", step), loop.meter.waiting():
                batch = next(batches)
            with control.doing("step", step):
                state, values = train_step(state, batch)
                asked, known = known, agreement.ask(control.requests)
            step += 1
            with control.doing("device", step):
                loop.settle()
                agreed = agreement.read(asked)
            loop.pending = (step, values)
            progress.advance(1)
            control.answer(agreed & Request.SAVE)
            preempted = Request.STOP in agreed and step < train.steps
            evaluates = loop.due(train.evaluate_every_steps, step) and not preempted
            saves = preempted or Request.SAVE in agreed or step == boundary or loop.due(train.save_every_steps, step)
            if not (evaluates or saves):
                continue
            with control.doing("device", step):
                loop.settle()
            with loop.meter.paused():
                ended = loop.visit(state, step, evaluates=evaluates, saves=saves)
            if preempted:
                hooks.finish_saves()
                raise PreemptedError(f"asked to stop: step {step} of {train.steps} is saved; the same command goes on")
            if ended:
                break
        with control.doing("save", step):
            hooks.finish_saves()
    return state, loop.history, loop.meter.flops
