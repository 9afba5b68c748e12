"""Growth itself: of a training state, as a pure function, and of a checkpoint on disk, with its receipt."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growth.index_map import map_axes
from growth.moments import grow_first_moment, grow_multiplier, grow_second_moment
from growth.operators import grow_parameter
from growth.plan import GrowthPlan, plan_growth
from growth.verify import Receipt, check_receipt, draw_batches, measure_growth
from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_arrays,
    load_checkpoint_info,
    save_checkpoint,
    verify_checkpoint,
)
from t5pegasus.config import ModelConfig, read_json, write_json
from t5pegasus.data.loader import PackedRows, load_epoch
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.progress import Progress
from t5pegasus.train.state import TrainState, arrays_to_state, state_to_arrays

RECEIPT = "receipt.json"
_HELDOUT_BATCH_SIZE = 8
_MAX_HELDOUT_BATCHES = 4


def grow_state(state: TrainState, specs: Mapping[str, ParamSpec], plan: GrowthPlan) -> TrainState:
    """The state of the grown model: a pure function in the precision of the state.

    NumPy in gives NumPy out, without a device; JAX in gives JAX out, also under `jax.jit`.

    Args:
        state: of the source model; moments and multipliers may be empty, as in a converted checkpoint.
        specs: declarations of the source's parameters.
        plan: where to; its seed decides every random number, together with the parameter's name.

    Returns:
        Parameters, moments, multipliers and moving average of the target's sizes, the average by the operators and
        random numbers of the parameters; step and data position as they were.
    """
    maps = map_axes({axis for spec in specs.values() for axis in spec.axes}, plan.source, plan.target)

    def grow_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: grow_parameter(array, specs[name], maps, _random_numbers(plan.seed, name), plan.noise)
            for name, array in weights.items()
        }

    return TrainState(
        step=state.step,
        rows=state.rows,
        parameters=grow_weights(state.parameters),
        first_moment={name: grow_first_moment(array, specs[name], maps) for name, array in state.first_moment.items()},
        second_moment={
            name: grow_second_moment(array, specs[name], maps) for name, array in state.second_moment.items()
        },
        multipliers={
            axis: grow_multiplier(multiplier, maps[axis]) if axis in maps else multiplier
            for axis, multiplier in state.multipliers.items()
        },
        ema=grow_weights(state.ema),
    )


class GrownCheckpoint(NamedTuple):
    """What `grow_checkpoint` made or found."""

    path: Path
    plan: GrowthPlan
    receipt: Receipt
    already_there: bool
    """True if an earlier, finished call had made it."""


def grow_checkpoint(
    checkpoint_path: Path,
    target: ModelConfig,
    output_path: Path,
    *,
    seed: int = 0,
    examples_path: Path | None = None,
) -> GrownCheckpoint:
    """Grow a checkpoint into one of the same form, and prove it: plan, grow, measure, save.

    Killed at any point it leaves nothing that counts as a checkpoint, and the same call again gives the same
    arrays; finished, the same call again only says so.

    Args:
        checkpoint_path: a checkpoint folder, or a run, whose last good checkpoint is meant.
        target: config to reach; see `plan_growth`.
        output_path: folder to create; holds also `receipt.json`.
        seed: of the new random entries.
        examples_path: examples to compare the models on, the `heldout` ones in it if it has such a folder;
            None takes random tokens.

    Raises:
        UsageError: if the plan is refused, or the examples have another tokenizer.
        ArtifactError: if the checkpoint is damaged, the output path holds something else, or the logits of
            the grown model differ by more than rounding (see `check_receipt`).
    """
    checkpoint_path = find_checkpoint(checkpoint_path)
    info = load_checkpoint_info(checkpoint_path)
    plan = plan_growth(info.config.model, target, seed)
    entry = {
        "plan": plan.to_json(),
        "plan_hash": plan.hash,
        "source_fingerprint": verify_checkpoint(checkpoint_path)["fingerprint"],
        "step": info.step,
    }
    if output_path.exists():
        return GrownCheckpoint(output_path, plan, _read_finished(output_path, entry), already_there=True)
    batches, evidence = _load_evidence(checkpoint_path, info, seed, examples_path)
    with Progress("grow", total=4, unit="stages") as progress:
        source = arrays_to_state(load_arrays(checkpoint_path))
        progress.advance()
        grown = grow_state(source, declare_parameters(plan.source), plan)
        arrays = state_to_arrays(grown)
        progress.advance()
        size = sum(array.nbytes for array in arrays.values())
        receipt = measure_growth(plan, source.parameters, grown.parameters, batches, evidence, size)
        check_receipt(receipt)
        progress.advance()
        grown_info = dataclasses.replace(
            info, config=dataclasses.replace(info.config, model=target), lineage=(*info.lineage, entry)
        )
        save_checkpoint(
            output_path,
            arrays,
            grown_info,
            checkpoint_path / "tokenizer",
            lambda folder: write_json(folder / RECEIPT, receipt.to_json()),
        )
        progress.advance()
    return GrownCheckpoint(output_path, plan, receipt, already_there=False)


def _random_numbers(seed: int, name: str) -> np.random.Generator:
    """A counter-based stream for each parameter, the same on every platform (Salmon et al. 2011, Philox)."""
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([seed, own], np.uint64)))


def _read_finished(output_path: Path, entry: Mapping[str, Any]) -> Receipt:
    """The receipt of a growth that is finished, if it is this very one."""
    if not (output_path / RECEIPT).is_file():
        raise ArtifactError(
            f"{output_path} exists and is no grown checkpoint; delete it, or choose another --output-path"
        )
    verify_checkpoint(output_path)
    found = load_checkpoint_info(output_path).lineage[-1]
    for key, what in (("plan_hash", "plan"), ("source_fingerprint", "source checkpoint")):
        if found[key] != entry[key]:
            raise ArtifactError(
                f"{output_path} is there already, grown by another {what}: {found[key][:12]}…, "
                f"this is {entry[key][:12]}…; delete it, or choose another --output-path"
            )
    fields = read_json(output_path / RECEIPT)
    del fields["schema"]
    return Receipt(**fields)


def _load_evidence(
    checkpoint_path: Path, info: CheckpointInfo, seed: int, examples_path: Path | None
) -> tuple[list[Batch], str]:
    """Batches to compare the models on, and what they are."""
    model, data = info.config.model, info.config.data
    if examples_path is None:
        return draw_batches(model, data, seed), f"random tokens, seed {seed}"
    heldout_path = examples_path / "heldout"
    if heldout_path.is_dir():
        examples_path = heldout_path
    with PackedRows(examples_path, data, model.pad_token_id, model.decoder_start_token_id) as rows:
        tokenizer = rows.shards.manifest["tokenizer_fingerprint"]
        if tokenizer != info.tokenizer_fingerprint:
            raise UsageError(
                f"tokenizer of checkpoint {checkpoint_path} is {info.tokenizer_fingerprint}, that of the examples in "
                f"{examples_path} is {tokenizer}; give examples built with {checkpoint_path / 'tokenizer'}"
            )
        batches = itertools.islice(load_epoch(rows, _HELDOUT_BATCH_SIZE), _MAX_HELDOUT_BATCHES)
        return list(batches), str(examples_path)
