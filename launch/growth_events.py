"""From a growth schedule to the events of a run: what growth is to the training loop, which does not know it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.growth_schedule import NONE, AtStep, Stage, WhenFlat, read_schedule, read_stage
from launch.verbs.grow import choose_target
from t5pegasus.config import ModelConfig, OptimizerConfig, RunConfig
from t5pegasus.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from growth.t5 import ModelGrowth
    from t5pegasus.train.phases import Event
    from t5pegasus.train.state import TrainState

FIELDS = ("d_model", "d_ff", "num_heads", "d_kv", "num_encoder_layers", "num_decoder_layers")
"""What of a model a run can grow; tokens belong to its examples."""
LOSSLESS = ("B", "R")
"""Promises under which the held-out loss must stay."""


def choose_stages(given: Sequence[str] | None, run_path: Path) -> tuple[Stage, ...]:
    """The stages of a run: those given, or else those it was last given; of these, with `none`, the ones it has made.

    Raises:
        UsageError: if a stage cannot be read.
    """
    from t5pegasus.checkpoint import list_checkpoints, load_checkpoint_info
    from t5pegasus.train.phases import plan_hashes
    from t5pegasus.train.run_folder import load_recorded_events

    if given is not None and list(given) != [NONE]:
        return read_schedule(given)
    recorded = load_recorded_events(run_path)
    if given is not None:
        newest = list_checkpoints(run_path)[:1]
        made = plan_hashes(load_checkpoint_info(newest[0]).lineage) if newest else frozenset()
        recorded = [event for event in recorded if event["plan_hash"] in made]
    return tuple(read_stage(event["asked"], f"{run_path / 'config.json'}: {event['name']}") for event in recorded)


def plan_events(config: RunConfig, stages: Sequence[Stage]) -> "tuple[Event, ...]":
    """The events of a run begun with `config`, each planned on the model that the one before leaves.

    Raises:
        UsageError: if a plan is refused, naming its stage.
    """
    events = []
    model = config.model
    for number, stage in enumerate(stages, 1):
        name = f"growth stage {number} ({stage})"
        try:
            event, model = _plan_event(name, stage, model, config.optimizer)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        events.append(event)
    return tuple(events)


def _plan_event(
    name: str, stage: Stage, source: ModelConfig, optimizer: OptimizerConfig
) -> "tuple[Event, ModelConfig]":
    from growth.t5 import plan_growth
    from t5pegasus.train.early_stopping import this_phase
    from t5pegasus.train.phases import Event

    target = choose_target(source, stage.to, dict.fromkeys(FIELDS))
    growth = plan_growth(source, target, stage.plan, optimizer=optimizer)
    if growth.plan.choices.learned is not None:
        raise UsageError(
            "learned maps are trained before a model is grown, which a run cannot do on its way; leave `learned` out "
            "of the plan, or end the run there, grow its checkpoint by t5pegasus grow, and pretrain --start-from that"
        )

    event = Event(
        name=name,
        kind="growth",
        plan_hash=growth.hash,
        entry={"plan": growth.to_json()},
        facts={"promise": growth.plan.promise, "source": source.to_json(), "target": growth.target.to_json()},
        asked=stage.to_json(),
        is_due=lambda step, history: stage.when.is_due(step, this_phase(history)),
        change_config=growth.change_config,
        change_state=functools.partial(_grow, growth),
        check=functools.partial(check_losses, name, growth.plan.promise),
        at_step=stage.when.step if isinstance(stage.when, AtStep) else None,
        needs_heldout=isinstance(stage.when, WhenFlat),
    )
    return event, growth.target


def check_losses(name: str, promise: str, before: float, after: float, compute_dtype: str) -> None:
    """Refuse a growth that promised the same function and whose loss moved by more than rounding moves it.

    A light check, made by what a run measures anyway: a mean over all tokens, of which rounding moves little. The
    receipt of `t5pegasus grow` looks at every logit.

    Args:
        name: of the stage.
        promise: of its plan.
        before: loss of the source, nats per target token.
        after: of the grown model, on the same rows.
        compute_dtype: of the activations, whose rounding counts.

    Raises:
        ArtifactError: with both losses.
    """
    if promise not in LOSSLESS:
        return
    limit = relative_rounding(compute_dtype) * abs(before)
    if not abs(after - before) <= limit:  # also where one of them is no number
        raise ArtifactError(
            f"{name}: the loss was {before:.6f} before growth and is {after:.6f} behind it, at most {limit:.1e} of "
            "difference was wanted; nothing was saved, and the run's last checkpoint is that of before. Growth is at "
            "fault, not the run: please report it; to train on without this stage change --growth"
        )


def relative_rounding(compute_dtype: str) -> float:
    """By what part of itself rounding may move a mean loss: 2⁻⁸, that of bfloat16, or 256 times that of float32.

    Accelerators make float32 products of shorter numbers unless told otherwise, so float32 counts on a CPU only.
    """
    import jax
    import numpy as np

    short = compute_dtype == "bfloat16" or jax.default_backend() != "cpu"
    return 2.0**-8 if short else 256 * float(np.finfo(np.float32).eps)


def _grow(growth: "ModelGrowth", state: "TrainState", mesh: "Mesh") -> "TrainState":
    from growth.mesh import grow_on_mesh

    plan = dataclasses.replace(growth.plan, step=int(state.step))
    return grow_on_mesh(state, dataclasses.replace(growth, plan=plan), mesh)
