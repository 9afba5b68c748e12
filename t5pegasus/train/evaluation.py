"""What a run evaluates while it trains: held-out loss by teacher forcing, and scores it is given a function for."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.data.loader import load_epoch
from t5pegasus.data.mixed_rows import MixedRows
from t5pegasus.errors import UsageError
from t5pegasus.train.agreement import Check
from t5pegasus.train.heldout_loss import make_heldout_loss
from t5pegasus.train.state import TrainState, evaluated_parameters

Evaluate = Callable[[TrainState, Check], dict[str, float]]
"""State → scores of the weights that users will take; the check is called between batches, and may raise."""
Sampler = Callable[[RunConfig, Mapping[str, Any]], list[dict[str, Any]]]
"""Config, parameters by dotted name, split over the mesh as they are trained → summaries of a few held-out sources,
each {source, reference, summary, scores}. All processes call it together, and have the same sources."""

LOSSES = ("loss", "accuracy")
"""What is known without writing summaries."""


class Scorer(NamedTuple):
    """Further scores of parameters, such as ROUGE of the summaries they write."""

    names: tuple[str, ...]
    score: Callable[[Mapping[str, Any], Check], dict[str, float]]
    """Parameters by dotted name, split over the mesh as they are trained → each of `names`; the check is called between
    batches. All processes call it together, and score the same."""
    fingerprint: str = ""
    """Of what is scored, for all processes to agree on before."""


def make_evaluate(
    rows: MixedRows, config: RunConfig, mesh: Mesh, scorer: Scorer | None, max_rows: int | None = None
) -> Evaluate:
    """A function state → held-out losses and accuracy, and the scores, of the weights that users will take.

    With `max_rows` the losses are those of about as many rows, the first ones, in whole batches.
    """
    heldout_loss = make_heldout_loss(config, mesh, rows.names)
    batch_size = config.train.batch_size // config.train.accumulation_steps

    def evaluate(state: TrainState, check: Check) -> dict[str, float]:
        parameters = evaluated_parameters(state)
        max_batches = None if max_rows is None else -(-max_rows // batch_size)
        losses = heldout_loss(parameters, _checked(itertools.islice(load_epoch(rows, batch_size), max_batches), check))
        if scorer is None:
            return losses
        scores = scorer.score(parameters, check)
        return losses | dict(zip(scorer.names, _agree([scores[name] for name in scorer.names])))

    return evaluate


def make_sample(
    sampler: Sampler | None, config: RunConfig
) -> Callable[[TrainState, Check], list[dict[str, Any]]] | None:
    """A function state → summaries by the weights that users will take; None if not wanted."""
    if sampler is None or not config.train.sample_every_steps:
        return None

    def sample(state: TrainState, check: Check) -> list[dict[str, Any]]:
        return sampler(config, evaluated_parameters(state))

    return sample


def check_samples(config: RunConfig, sampler: Sampler | None, *, has_heldout: bool) -> None:
    """Refuse samples that this run cannot write.

    Raises:
        UsageError: with what is missing.
    """
    if config.train.sample_every_steps and not has_heldout:
        raise UsageError(
            f"train.sample_every_steps={config.train.sample_every_steps} writes summaries of held-out sources, and "
            "there are none; give --heldout-path"
        )
    if config.train.sample_every_steps and sampler is None:
        raise UsageError("train.sample_every_steps is for pretrain and finetune; this run writes no samples")


def _checked(batches: Iterable[Batch], check: Check) -> Iterator[Batch]:
    for batch in batches:
        check()
        yield batch


def check_keep_best(config: RunConfig, scorer: Scorer | None, *, has_heldout: bool) -> None:
    """Refuse a `train.keep_best` that this run will not know.

    Raises:
        UsageError: naming what it will know.
    """
    wanted = config.train.keep_best
    known = LOSSES + (scorer.names if scorer else ())
    if wanted is None:
        return
    if not has_heldout:
        raise UsageError(f"train.keep_best={wanted!r} needs held-out examples; give --heldout-path")
    if wanted not in known:
        raise UsageError(
            f"train.keep_best={wanted!r} is not evaluated in this run; choose one of {', '.join(known)}; "
            "scores of summaries are for finetune"
        )


def _agree(values: list[float]) -> list[float]:
    """Process 0's values: all must stop, or save, at the same step, even if their last bits differ."""
    if jax.process_count() == 1:
        return values
    bits = np.array(values, np.float64).view(np.uint32)  # float64 would lose bits on its way over the devices
    return np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64).tolist()
