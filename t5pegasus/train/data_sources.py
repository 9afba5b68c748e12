"""The rows that a run trains on and is measured by: opened, and held against its model and its past."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.config import DataConfig, RunConfig
from t5pegasus.data.loader import PackedRows
from t5pegasus.data.mixed_rows import MixedRows
from t5pegasus.data.mixture import Change, Changes, change_weights
from t5pegasus.data.quarantine import Quarantine
from t5pegasus.errors import UsageError
from t5pegasus.storage import open_path

HELDOUT_FOLDER = "heldout"


def fit_to_examples(config: RunConfig, manifest: Mapping[str, Any]) -> RunConfig:
    """The config with the vocabulary size and the special ids of the examples' tokenizer."""
    model = dataclasses.replace(
        config.model,
        vocab_size=manifest["vocab_size"],
        pad_token_id=manifest["pad_id"],
        decoder_start_token_id=manifest["start_id"],
        eos_token_id=manifest["end_id"],
    )
    return dataclasses.replace(config, model=model)


def name_sources(config: DataConfig) -> tuple[str, ...]:
    """Short names of the folders of a mixture, for metrics: the last part of their paths, or as much as tells apart."""
    folders = [folder.rstrip("/") for folder in config.mixture_weights()]
    for depth in range(1, 1 + max((folder.count("/") for folder in folders), default=0)):
        names = tuple("/".join(folder.split("/")[-depth:]) for folder in folders)
        if len(set(names)) == len(folders):
            return names
    return tuple(folders)


def open_data(
    examples_path: Path, heldout_path: Path | None, config: RunConfig, stack: contextlib.ExitStack
) -> tuple[MixedRows, MixedRows | None]:
    """The rows to train on and those for the held-out loss (`open_rows`, `open_heldout`), to be closed by the stack.

    Together they may hold `config.data.max_bad_examples` that cannot be used.
    """
    quarantine = Quarantine(config.data.max_bad_examples)
    rows = stack.enter_context(open_rows(examples_path, config, quarantine))
    heldout_rows = open_heldout(heldout_path, rows, config, quarantine)
    if heldout_rows is not None:
        stack.enter_context(heldout_rows)
    return rows, heldout_rows


def open_rows(examples_path: Path, config: RunConfig, quarantine: Quarantine) -> MixedRows:
    """The rows to train on: of the mixture, or of the one folder where there is none.

    Raises:
        ArtifactError: if examples are missing or damaged.
        UsageError: if they are not of the model's tokenizer.
    """
    weights = config.data.mixture_weights()
    folders = dict(zip(name_sources(config.data), map(open_path, weights))) if weights else {"": examples_path}
    rows = _mix(folders, dict(zip(folders, weights.values() or [1.0])), config, quarantine)
    _check_tokenizer(config, rows.shards.manifest, rows.shards.path)
    return rows


def open_heldout(
    heldout_path: Path | None, rows: MixedRows, config: RunConfig, quarantine: Quarantine
) -> MixedRows | None:
    """The rows for the held-out loss: of the folder given, or of `heldout` in each source; None if there are none.

    Raises:
        ArtifactError: if examples are damaged.
        UsageError: if they are of another tokenizer than those to train on.
    """
    if heldout_path is not None:
        folders = {"": heldout_path}
    else:
        beside = {name: source.shards.path / HELDOUT_FOLDER for name, source in zip(rows.names, rows.sources)}
        folders = {name: path for name, path in beside.items() if path.exists()}
    if not folders:
        return None
    heldout = _mix(folders, dict.fromkeys(folders, 1.0), config, quarantine)
    got, wanted = (each.shards.manifest["tokenizer_fingerprint"] for each in (heldout, rows))
    if got != wanted:
        heldout.close()
        raise UsageError(
            f"the held-out examples {heldout.shards.path} have another tokenizer than {rows.shards.path}: "
            f"{got[:12]}…, {wanted[:12]}… was wanted; build both with the same --tokenizer-path"
        )
    return heldout


class GivenExamples(NamedTuple):
    """What a run is to train on now."""

    path: Path
    """The folder; of a mixture the first one."""
    manifest: Mapping[str, Any]
    """Its manifest."""
    weights: Mapping[str, float]
    """Of the mixture: fingerprint of the examples → weight."""


def follow_mixture(path: Path, info: CheckpointInfo, examples: GivenExamples, config: RunConfig) -> Changes:
    """The changes of weights behind a checkpoint, with those of now from its row on.

    Weights may change and sources may be added; one that was in use must be named, with weight 0 to leave it out, so
    that a forgotten or rebuilt folder is no change by accident.

    Args:
        path: the checkpoint.
        info: what it says.
        examples: what is given now.
        config: of the run.

    Raises:
        UsageError: if sources in use are missing, or rows are now others for another reason.
    """
    way_out = (
        "give the examples and data lengths it was trained on, or begin a new run on the others at their first "
        f"row: --run-path NEW --start-from {path} --reset-rows"
    )
    stored, now = (
        dataclasses.replace(each, mixture=(), max_bad_examples=0) for each in (info.config.data, config.data)
    )
    if stored != now:
        raise UsageError(f"data config of checkpoint {path} is {stored}, got {now}; {way_out}")
    before = read_changes(info)
    weights = examples.weights
    missing = [name for name in (before[-1].shares() if before else {"no examples": 1}) if name not in weights]
    if missing and max([len(change.weights) for change in before], default=1) == len(weights) == 1:
        raise UsageError(
            f"{examples.path} holds other examples ({next(iter(weights))[:12]}…) than checkpoint {path} was trained on "
            f"({_abbreviate(missing[0])}); {way_out}"
        )
    if missing:
        digests = ", ".join(map(_abbreviate, missing))
        named, given = info.config.data.mixture_weights(), config.data.mixture_weights()
        absent = [folder for folder in named if folder not in given] or list(named)
        folders = f"those of {', '.join(absent)} ({digests})" if named else digests
        raise UsageError(
            f"checkpoint {path} was trained on a mixture with the examples {folders}, which are not given; "
            f"name their folder in --data.mixture, with =0 to leave it out from now on; or {way_out}"
        )
    return change_weights(before, info.rows, weights)


def _abbreviate(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 12 else f"{fingerprint[:12]}…"


def read_changes(info: CheckpointInfo) -> Changes:
    """The changes of weights that a checkpoint tells of; empty if its rows are of no known examples."""
    if info.examples_fingerprint is None:
        return ()
    if info.mixture:
        return tuple(map(Change.from_json, info.mixture))
    return (Change(0, {info.examples_fingerprint: 1.0}),)


def _mix(
    folders: Mapping[str, Path], weights: Mapping[str, float], config: RunConfig, quarantine: Quarantine
) -> MixedRows:
    model = config.model
    with contextlib.ExitStack() as stack:
        sources = {
            name: stack.enter_context(
                PackedRows(
                    path,
                    config.data,
                    model.pad_token_id,
                    model.decoder_start_token_id,
                    num_open_tokens=model.num_open_tokens if model.num_masked_tokens else None,
                    quarantine=quarantine,
                )
            )
            for name, path in folders.items()
        }
        rows = MixedRows(sources, weights, config.data.seed)
        stack.pop_all()
    return rows


def _check_tokenizer(config: RunConfig, manifest: Mapping[str, Any], examples_path: Path) -> None:
    wanted = fit_to_examples(config, manifest).model
    for field in ("vocab_size", "pad_token_id", "decoder_start_token_id", "eos_token_id"):
        if getattr(config.model, field) != getattr(wanted, field):
            raise UsageError(
                f"model.{field}={getattr(config.model, field)} differs from {getattr(wanted, field)} of the tokenizer "
                f"in {examples_path}; build the examples with the tokenizer in the checkpoint's folder"
            )
