"""Phases of a run: between two of them an event, such as growth, changes the model at a save boundary.

An event is pure: what it makes of a state follows from the state alone, and whether it is due from the step and the
history that the checkpoint holds. Nothing is therefore saved at an event. A run that is killed behind one goes back to
the checkpoint in front of it, decides the same and does the same again; a checkpoint of the changed state says in its
lineage that the event has been. The loop, and this package, do not know what an event does.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.train.early_stopping import History
from t5pegasus.train.state import TrainState

Lineage = tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of config and state that a run makes once."""

    name: str
    """How messages call it."""
    kind: str
    """Of its record in the metrics."""
    plan_hash: str
    """Its identity: with an entry of this hash in the lineage it has been."""
    entry: Mapping[str, Any]
    """What the lineage is told beside hash, step and source."""
    facts: Mapping[str, Any]
    """What the metrics are told beside what is measured."""
    asked: Mapping[str, Any]
    """What the user asked for, as config.json keeps it."""
    is_due: Callable[[int, History], bool]
    """(step, history) of a checkpoint → whether to change the model behind it; pure."""
    change_config: Callable[[RunConfig, int], RunConfig]
    """(config before, step) → config behind it; pure."""
    change_state: Callable[[TrainState, Mesh], TrainState]
    """State before, on the mesh → state behind it, on the same mesh; pure."""
    check: Callable[[float, float, str], None]
    """Raises if the losses before and behind, in this compute dtype, are not what the event promises."""
    at_step: int | None = None
    """A step that is a save boundary for its sake."""
    needs_heldout: bool = False
    """Whether it can be due only where held-out losses are in the history."""


def next_event(events: Iterable[Event], lineage: Lineage) -> Event | None:
    """The first event that has not been."""
    been = plan_hashes(lineage)
    return next((event for event in events if event.plan_hash not in been), None)


def due_event(
    events: Iterable[Event], lineage: Lineage, config: RunConfig, step: int, history: History
) -> Event | None:
    """The next event, if it is due at this checkpoint and the run is not at its end."""
    event = next_event(events, lineage)
    return event if event is not None and step < config.train.steps and event.is_due(step, history) else None


def phase_end(events: Iterable[Event], lineage: Lineage, config: RunConfig, step: int) -> int:
    """The step at which the phase ends, as far as that is known beforehand."""
    event = next_event(events, lineage)
    at_step = None if event is None else event.at_step
    return at_step if at_step is not None and at_step > step else config.train.steps


def config_after(config: RunConfig, events: Iterable[Event], lineage: Lineage) -> RunConfig:
    """The config of a run begun with `config`, after those events that the lineage knows."""
    steps = {entry["plan_hash"]: entry["step"] for entry in lineage}
    for event in events:
        if event.plan_hash in steps:
            config = event.change_config(config, steps[event.plan_hash])
    return config


def plan_hashes(lineage: Lineage) -> frozenset[str]:
    """Identities of all changes that a model went through."""
    return frozenset(entry["plan_hash"] for entry in lineage)


def check_events_kept(
    run_path: Path, recorded: Sequence[Mapping[str, Any]], events: Collection[Event], lineage: Lineage
) -> None:
    """Refuse to continue a run without an event that it has behind it; those ahead may change.

    Args:
        run_path: the run, for the message.
        recorded: events in its config.json.
        events: those given now.
        lineage: of its last checkpoint.

    Raises:
        UsageError: naming the event.
    """
    been, given = plan_hashes(lineage), {event.plan_hash for event in events}
    for each in recorded:
        if each["plan_hash"] in been - given:
            raise UsageError(
                f"{run_path} has {each['name']} behind it, which the schedule given now does not have; "
                "leave --growth out to go on with the schedule of the run, or change only stages that are still ahead"
            )


def record_event(event: Event) -> dict[str, Any]:
    """An event as config.json keeps it."""
    return {"name": event.name, "plan_hash": event.plan_hash, "asked": dict(event.asked)}
