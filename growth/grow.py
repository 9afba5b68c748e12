"""Growth of a checkpoint on disk, with its receipt (of a training state in memory: `growth.state`)."""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growth.acceptance import check_receipt
from growth.evidence import EvidenceShape, load_evidence
from growth.execution import execute_growth
from growth.learned import count_training_flops
from growth.learned_checkpoint import identify_learning, learn_arrays
from growth.plan import Choices
from growth.receipt import LEVELS, RECEIPT, Receipt
from growth.receipt_costs import estimate_receipt, format_bytes, read_available_bytes
from growth.state import grow_state
from growth.t5 import ModelGrowth, plan_growth
from growth.verify import Request, measure_apart, peak_memory
from growth.vocabulary import ExtendedVocabulary, extend_vocabulary
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info, verify_checkpoint
from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError, UsageError, reading
from t5pegasus.json_files import SCHEMA, read_json, write_json
from t5pegasus.manifest import MANIFEST

__all__ = ["Costs", "GrownCheckpoint", "costs_path", "grow_checkpoint", "grow_state"]

logger = logging.getLogger(__name__)


class Costs(NamedTuple):
    """What a growth took in the first process, which differs from run to run."""

    bytes_read: int = 0
    """Of the source's arrays."""
    bytes_written: int = 0
    """Of the grown arrays."""
    bytes_found: int = 0
    """Written by an earlier call that was interrupted."""
    surgery_seconds: float | None = None
    surgery_peak_bytes: int | None = None
    """The largest resident memory of the whole process until the arrays were written, imports and all."""
    receipt_seconds: float | None = None
    receipt_peak_bytes: int | None = None
    """The same of the process that measured the receipt."""

    def __str__(self) -> str:
        parts = [f"read {self.bytes_read:,} bytes", f"wrote {self.bytes_written:,}"]
        if self.bytes_found:
            parts.append(f"found {self.bytes_found:,} written before")
        for what, seconds, peak in (
            ("surgery", self.surgery_seconds, self.surgery_peak_bytes),
            ("receipt", self.receipt_seconds, self.receipt_peak_bytes),
        ):
            memory = "" if peak is None else f" in {peak / 2**20:,.0f} MiB"
            if seconds is not None:
                parts.append(f"{what} {seconds:.1f} s{memory}")
        return ", ".join(parts)


class GrownCheckpoint(NamedTuple):
    """What `grow_checkpoint` made or found."""

    path: Path
    growth: ModelGrowth
    receipt: Receipt
    already_there: bool
    """True if an earlier, finished call had made it."""
    costs: Costs | None = None
    """Of making it; None where that is no longer known."""


def grow_checkpoint(
    checkpoint_path: Path,
    target: ModelConfig,
    output_path: Path,
    *,
    choices: Choices | Mapping[str, Any] | None = None,
    examples_path: Path | None = None,
    receipt: str = "full",
    tokens: Sequence[str] = (),
    masked: bool = False,
) -> GrownCheckpoint:
    """Grow a checkpoint into one of the same form, and prove it: plan, grow, measure, give it its name.

    The arrays are read and written block by block, so that memory is a few chunks, whatever their size; only the
    receipt holds both models, in a process of its own. Every process of a multi-process run calls this and writes its
    share. Killed at any point it leaves nothing that counts as a checkpoint, and the same call again goes on from there
    and ends with the same bytes; finished, the same call again only says so. Beside the checkpoint, in
    `OUTPUT.costs.json`, stands what all of it took. Where the plan has learned maps, parameters and their average are
    in memory, of both models.

    Args:
        checkpoint_path: a checkpoint folder, or a run, whose last good checkpoint is meant.
        target: config to reach; see `plan_growth`.
        output_path: folder to create; holds also `receipt.json`.
        choices: operators and policies, as an object or as a plan file has them.
        examples_path: examples to compare the models on, the `heldout` ones in it if it has such a folder;
            None takes random tokens. Learned maps learn from the examples themselves.
        receipt: how much is measured: `full`; `logits`, without gradients and updates; or `arrays`, without either
            model in memory. It is noted in the receipt.
        tokens: to add to tokenizer and vocabulary. The grown checkpoint's examples have to be built anew then, with its
            tokenizer, and it trains on from their first row.
        masked: whether these have no probability until they are opened (`num_masked_tokens`).

    Raises:
        UsageError: if the plan is refused, the output lies in the source, the examples have another tokenizer, or maps
            are to learn without any.
        DivergedError: if the loss of learned maps is not finite.
        ArtifactError: if the checkpoint is damaged, the output path holds something else, or the grown model is not
            what its plan promises (see `check_receipt`).
        OSError: if the disk is full or fails, or memory is too small for the receipt; the same call then goes on.
    """
    if receipt not in LEVELS:
        raise UsageError(f"receipt={receipt!r} must be one of {', '.join(LEVELS)}")
    checkpoint_path = find_checkpoint(checkpoint_path)
    if output_path.resolve().is_relative_to(checkpoint_path.resolve()):
        raise UsageError(
            f"the output {output_path} lies in the checkpoint that is to grow, {checkpoint_path}, which must stay as "
            "it is; choose another --output-path, outside of it"
        )
    if not tokens:
        return _grow(checkpoint_path, target, output_path, choices, examples_path, receipt, None)
    with tempfile.TemporaryDirectory() as folder:
        extended = extend_vocabulary(
            checkpoint_path / "tokenizer", tokens, target, choices, Path(folder) / "tokenizer", masked=masked
        )
        return _grow(checkpoint_path, extended.target, output_path, extended.choices, examples_path, receipt, extended)


def _grow(
    checkpoint_path: Path, target: ModelConfig, output_path: Path, choices: Choices | Mapping[str, Any] | None,
    examples_path: Path | None, receipt: str, extended: ExtendedVocabulary | None,
) -> GrownCheckpoint:  # fmt: skip
    info = load_checkpoint_info(checkpoint_path)
    growth = plan_growth(info.config.model, target, choices, step=info.step, optimizer=info.config.optimizer)
    identity = {
        "plan_hash": growth.hash,
        "source_fingerprint": read_json(checkpoint_path / MANIFEST)["fingerprint"],
        "tokenizer_fingerprint": extended.tokenizer_fingerprint if extended else info.tokenizer_fingerprint,
    }
    identity |= identify_learning(checkpoint_path, info, growth, examples_path)
    entry = {"plan": growth.to_json(), **identity, "step": info.step}
    flops = info.flops
    if growth.plan.choices.learned is not None:
        entry["learning_flops"] = count_training_flops(growth, info.config)
        flops = None if flops is None else flops + entry["learning_flops"]
    if output_path.exists():
        found = _read_finished(output_path, entry)
        return GrownCheckpoint(output_path, growth, found, already_there=True, costs=_read_costs(output_path))
    batches, evidence = load_evidence(checkpoint_path, info, growth.plan.choices.seed, examples_path)
    _announce(growth, receipt, batches)
    start, costs = time.monotonic(), Costs()

    def check(folder: Path) -> None:
        nonlocal costs
        surgery = Costs(surgery_seconds=time.monotonic() - start, surgery_peak_bytes=peak_memory())
        measured = measure_apart(Request(checkpoint_path, folder, growth, batches, evidence, receipt))
        check_receipt(measured.receipt)
        write_json(folder / RECEIPT, measured.receipt.to_json())
        costs = surgery._replace(receipt_seconds=measured.seconds, receipt_peak_bytes=measured.peak_bytes)

    def learn(folder: Path) -> dict[str, np.ndarray]:
        if growth.plan.choices.learned is None or examples_path is None:
            return {}
        return learn_arrays(checkpoint_path, info, growth, examples_path, folder)

    config = growth.change_config(info.config, info.step)
    grown_info = dataclasses.replace(info, config=config, lineage=(*info.lineage, entry), flops=flops, course={})
    tokenizer_path = checkpoint_path / "tokenizer"
    if extended is not None:
        tokenizer_path = extended.tokenizer_path
        grown_info = dataclasses.replace(
            grown_info, tokenizer_fingerprint=extended.tokenizer_fingerprint, examples_fingerprint=None
        )
    report = execute_growth(
        checkpoint_path, growth, output_path, grown_info, identity, check, learn, tokenizer_path=tokenizer_path
    )
    costs = costs._replace(**dataclasses.asdict(report))
    if costs.receipt_seconds is not None:  # in the process that measured
        write_json(costs_path(output_path), {"schema": SCHEMA, **costs._asdict()})
    return GrownCheckpoint(output_path, growth, _read_receipt(output_path), already_there=False, costs=costs)


def _announce(growth: ModelGrowth, level: str, batches: Sequence[Batch]) -> None:
    """Say what the receipt will take, and warn if that is not there."""
    first = batches[0]
    (rows, source), target = first.encoder_input_tokens.shape, first.decoder_input_tokens.shape[1]
    shape = EvidenceShape(len(batches), rows, source, target)
    costs, available = estimate_receipt(growth, level, shape), read_available_bytes()
    logger.info("the receipt will take about %s on two cores, behind the surgery", costs)
    if available is not None and costs.bytes > available and level != LEVELS[-1]:
        smaller = (f"--receipt {each} about {format_bytes(estimate_receipt(growth, each, shape).bytes)}"
                   for each in LEVELS[LEVELS.index(level) + 1 :])  # fmt: skip
        logger.warning(
            "this machine has %s of memory left; the receipt of %s takes about %s, %s",
            format_bytes(available), level, format_bytes(costs.bytes), ", ".join(smaller),
        )  # fmt: skip


def _read_finished(output_path: Path, entry: Mapping[str, Any]) -> Receipt:
    """The receipt of a growth that is finished, if it is this very one."""
    if not (output_path / RECEIPT).is_file():
        raise ArtifactError(
            f"{output_path} exists and is no grown checkpoint; choose another --output-path, or move it out of the way"
        )
    verify_checkpoint(output_path)
    found = load_checkpoint_info(output_path).lineage[-1]
    names = (
        ("plan_hash", "plan"),
        ("source_fingerprint", "source checkpoint"),
        ("tokenizer_fingerprint", "tokenizer"),
        ("examples_fingerprint", "set of examples"),
    )
    for key, what in names:
        if found.get(key) != entry.get(key):
            raise ArtifactError(
                f"{output_path} is there already, grown by another {what}: {str(found.get(key))[:12]}…, "
                f"this is {str(entry.get(key))[:12]}…; delete it, or choose another --output-path"
            )
    return _read_receipt(output_path)


def _read_receipt(folder: Path) -> Receipt:
    with reading(folder / RECEIPT):
        return Receipt.from_json(read_json(folder / RECEIPT))


def costs_path(output_path: Path) -> Path:
    """Where the costs of a growth are: beside the checkpoint, in which the same growth has the same bytes."""
    return output_path.with_name(output_path.name + ".costs.json")


def _read_costs(output_path: Path) -> "Costs | None":
    path = costs_path(output_path)
    if not path.is_file():
        return None
    with reading(path):
        return Costs(**{key: value for key, value in read_json(path).items() if key in Costs._fields})
