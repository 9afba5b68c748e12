"""Growth itself: of a training state, as a pure function, and of a checkpoint on disk, with its receipt."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growth.execution import count_stored_bytes, execute_growth
from growth.leaves import grow_arrays
from growth.moments import grow_records
from growth.plan import Choices
from growth.t5 import ModelGrowth, plan_growth
from growth.verify import Receipt, check_receipt, draw_batches, measure_growth
from t5pegasus.axes import AxisMultiplier
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_arrays,
    load_checkpoint_info,
    verify_checkpoint,
)
from t5pegasus.config import ModelConfig, read_json, write_json
from t5pegasus.data.loader import PackedRows, load_epoch
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.manifest import MANIFEST
from t5pegasus.train.state import TrainState

RECEIPT = "receipt.json"
_HELDOUT_BATCH_SIZE = 8
_MAX_HELDOUT_BATCHES = 4


def grow_state(state: TrainState, growth: ModelGrowth) -> TrainState:
    """The state of the grown model, in the host's memory.

    Args:
        state: of the source model; moments, records and average may be empty, as in a converted checkpoint.
        growth: where to; its seed decides every random number, together with the parameter's name.

    Returns:
        NumPy arrays in the precision of the given ones: parameters, moments, records of axes and moving average (by the
        operators and random numbers of the parameters) of the target's sizes; step and data position as they were.
    """
    plan = growth.plan
    grown = {}
    for group, arrays in growth.split_state(state._asdict()).items():
        specs, power = growth.parts[group]
        grown[group] = grow_arrays(group, arrays, specs, plan, power=power)
    records = {axis: AxisMultiplier(*map(np.asarray, each)) for axis, each in state.multipliers.items()}
    return state._replace(**grown, multipliers=grow_records(records, plan.maps, plan.born))


class GrownCheckpoint(NamedTuple):
    """What `grow_checkpoint` made or found."""

    path: Path
    growth: ModelGrowth
    receipt: Receipt
    already_there: bool
    """True if an earlier, finished call had made it."""


def grow_checkpoint(
    checkpoint_path: Path,
    target: ModelConfig,
    output_path: Path,
    *,
    choices: Choices | Mapping[str, Any] | None = None,
    examples_path: Path | None = None,
) -> GrownCheckpoint:
    """Grow a checkpoint into one of the same form, and prove it: plan, grow, measure, give it its name.

    The arrays are read and written block by block, so that memory is a few chunks, whatever their size; only the
    receipt holds the parameters of both models. Every process of a multi-process run calls this and writes its share.
    Killed at any point it leaves nothing that counts as a checkpoint, and the same call again goes on from there and
    ends with the same bytes; finished, the same call again only says so.

    Args:
        checkpoint_path: a checkpoint folder, or a run, whose last good checkpoint is meant.
        target: config to reach; see `plan_growth`.
        output_path: folder to create; holds also `receipt.json`.
        choices: operators and policies, as an object or as a plan file has them.
        examples_path: examples to compare the models on, the `heldout` ones in it if it has such a folder;
            None takes random tokens.

    Raises:
        UsageError: if the plan is refused, or the examples have another tokenizer.
        ArtifactError: if the checkpoint is damaged, the output path holds something else, or the logits of
            the grown model differ by more than rounding (see `check_receipt`).
    """
    checkpoint_path, fingerprint = _find_source(checkpoint_path)
    info = load_checkpoint_info(checkpoint_path)
    growth = plan_growth(info.config.model, target, choices, step=info.step, optimizer=info.config.optimizer)
    identity = {"plan_hash": growth.hash, "source_fingerprint": fingerprint}
    entry = {"plan": growth.to_json(), **identity, "step": info.step}
    if output_path.exists():
        return GrownCheckpoint(output_path, growth, _read_finished(output_path, entry), already_there=True)
    batches, evidence = _load_evidence(checkpoint_path, info, growth.plan.choices.seed, examples_path)

    def check(folder: Path) -> None:
        parameters = (_load_parameters(checkpoint_path), _load_parameters(folder))
        receipt = measure_growth(growth, *parameters, batches, evidence, count_stored_bytes(folder))
        check_receipt(receipt)
        write_json(folder / RECEIPT, receipt.to_json())

    grown_info = dataclasses.replace(
        info, config=dataclasses.replace(info.config, model=growth.target), lineage=(*info.lineage, entry)
    )
    execute_growth(checkpoint_path, growth, output_path, grown_info, identity, check)
    return GrownCheckpoint(output_path, growth, _read_receipt(output_path), already_there=False)


def _find_source(path: Path) -> tuple[Path, str]:
    """The checkpoint that is meant, verified, and its fingerprint."""
    found = find_checkpoint(path)
    return found, read_json(found / MANIFEST)["fingerprint"]


def _load_parameters(folder: Path) -> dict[str, Any]:
    return {name.removeprefix("parameters."): array for name, array in load_arrays(folder, ("parameters.",)).items()}


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
    return _read_receipt(output_path)


def _read_receipt(folder: Path) -> Receipt:
    fields = read_json(folder / RECEIPT)
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
