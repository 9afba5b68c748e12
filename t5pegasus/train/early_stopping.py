"""Keep-best and early stopping, as pure functions of the history that every checkpoint carries.

An evaluation of a run that keeps its best checkpoint says in its entry of the history whether it was the best so far
(`best`: true or false). Nothing else is remembered, so a resumed run decides as one that was never stopped.
"""

import math
from collections.abc import Mapping
from typing import Any

from t5pegasus.config import TrainConfig

History = tuple[dict[str, Any], ...]
"""Evaluations so far: {step, loss}, with the score that decides and `best` where a run keeps its best checkpoint, and
`begins_phase` where patience and plateaus begin to count."""

LOWER_IS_BETTER = frozenset({"loss"})


def judge(config: TrainConfig, step: int, scores: Mapping[str, float], history: History) -> dict[str, Any]:
    """The entry of an evaluation: whether it is better than all before; equal or not finite is not better."""
    entry = plain_entry(config, step, scores)
    if config.keep_best is None:
        return entry
    value = scores[config.keep_best]
    reached = [each[config.keep_best] for each in history if each.get("best")]
    sign = -1 if config.keep_best in LOWER_IS_BETTER else 1
    is_best = math.isfinite(value) and (not reached or sign * value > sign * reached[-1])
    return entry | {"best": is_best}


def plain_entry(
    config: TrainConfig, step: int, scores: Mapping[str, float], *, begins_phase: bool = False
) -> dict[str, Any]:
    """The entry of an evaluation that cannot be the best, as that of the weights which a run begins from.

    `begins_phase` marks weights that have another past than this run, or had another size: patience and plateaus are
    counted from there.
    """
    entry = {"step": step, "loss": scores["loss"]}
    if config.keep_best is not None:
        entry |= {config.keep_best: scores[config.keep_best]}
    return entry | {"begins_phase": True} if begins_phase else entry


def has_stopped(config: TrainConfig, history: History) -> bool:
    """Whether `patience` evaluations have passed since the best one, or since the phase began."""
    since = 0
    for entry in history:
        since = 0 if entry.get("best") or entry.get("begins_phase") else since + ("best" in entry)
    return 0 < config.patience <= since


def this_phase(history: History) -> History:
    """The evaluations since the phase began: the last growth in the run, or the start from another run's weights."""
    begins = [index for index, entry in enumerate(history) if entry.get("begins_phase")]
    return history[begins[-1] :] if begins else history


def forget_best(history: History) -> History:
    """The history for a run that begins: what was best in another folder is not to be found in this one."""
    return tuple({name: value for name, value in entry.items() if name != "best"} for entry in history)
