"""Few-shot fine-tuning: one checkpoint, several numbers of examples, several seeds; each cell is done once.

A cell is an ordinary fine-tuning run in a folder of its own. Its scores are written when it is done, after which its
checkpoints may go: run again, the cells that are there are read and the others made.
"""

import dataclasses
import hashlib
import heapq
import json
import logging
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.validation import make_scorer, score_summaries_of
from t5pegasus.checkpoint import load_checkpoint_info, load_parameters, verify_checkpoint
from t5pegasus.config import RunConfig
from t5pegasus.corpus.build import BuildConfig, build_examples
from t5pegasus.corpus.pairs import NOT_A_PAIR, check_pair_paths, read_pairs
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, DataError, UsageError
from t5pegasus.evaluate.heldout import measure_heldout_loss
from t5pegasus.json_files import SCHEMA, read_json, write_json
from t5pegasus.text.clean import clean_text
from t5pegasus.text.read import Document, describe_dropped
from t5pegasus.train.agreement import no_check
from t5pegasus.train.run import RunPaths, train_run

logger = logging.getLogger(__name__)

LOSS = "heldout-loss"
RESULT = "cell.json"


@dataclasses.dataclass(frozen=True)
class FewShotPlan:
    """What is compared: cells are the pairs of a size and a seed, and size 0, the checkpoint as it is."""

    checkpoint: Path
    """A checkpoint folder that has been verified."""
    train_path: Path
    heldout_path: Path
    output_path: Path
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    max_heldout_pairs: int
    keep_runs: bool
    """Keep the checkpoints of finished cells."""

    def __post_init__(self) -> None:
        for name, least in (("sizes", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not values or min(values) < least or len(set(values)) < len(values):
                raise UsageError(f"{name}={values} must be different whole numbers from {least} on, at least one")
        if self.max_heldout_pairs < 1:
            raise UsageError(f"max_heldout_pairs={self.max_heldout_pairs} must be at least 1")


def run_few_shot(plan: FewShotPlan, config: RunConfig) -> list[dict[str, Any]]:
    """Make the cells that are not there yet; returns all of them as {size, seed, scores}, that of size 0 first.

    Args:
        plan: what to compare.
        config: of every cell, but for the seeds, which are the cell's (order of the data, dropout, noise).

    Raises:
        UsageError: if there are fewer pairs than the largest size.
        ArtifactError: if the output folder holds cells made of something else.
    """
    heldout = _write_pairs(
        plan.output_path / "heldout.jsonl", _first(_usable(plan.heldout_path), plan.max_heldout_pairs)
    )
    subsets = choose_pairs(_usable(plan.train_path), max(plan.sizes), plan.seeds)
    for seed, pairs in subsets.items():
        if len(pairs) < max(plan.sizes):
            raise UsageError(
                f"sizes={plan.sizes} wants {max(plan.sizes):,} different pairs, {plan.train_path} holds {len(pairs):,} "
                f"that can be used (seed {seed}); leave the larger sizes out"
            )
    scorer = score_summaries_of(config, plan.checkpoint / "tokenizer", heldout, plan.max_heldout_pairs)
    written = BuildConfig("pairs", config.data.max_source_tokens, config.data.max_target_tokens)

    def build(pairs_path: Path, output_path: Path) -> Path:
        build_examples([pairs_path], plan.checkpoint / "tokenizer", output_path, written, 1)
        return output_path

    heldout_examples = build(heldout, plan.output_path / "heldout_examples")

    def measure_start() -> dict[str, float]:
        parameters = load_parameters(plan.checkpoint)
        with ExampleShards(heldout_examples) as shards:
            examples = shards.read(np.arange(len(shards)))
        losses = measure_heldout_loss(config, parameters, examples, config.train.batch_size)
        return {LOSS: losses["loss"], **scorer.score(parameters, no_check)}

    def train(size: int, seed: int, folder: Path) -> dict[str, float]:
        pairs_path = _write_pairs(folder / "train.jsonl", subsets[seed][:size])
        own = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, seed=seed),
            train=dataclasses.replace(config.train, seed=seed),
        )
        paths = RunPaths(folder / "run", build(pairs_path, folder / "examples"), heldout_examples, plan.checkpoint)
        best = train_run(own, paths, keep_state=False, scorer=make_scorer(own, plan.checkpoint / "tokenizer", heldout))
        info = load_checkpoint_info(best)
        loss = next(entry["loss"] for entry in reversed(info.history) if entry["step"] == info.step)
        return {LOSS: loss, **scorer.score(load_parameters(best), no_check)}

    request = {
        "checkpoint": verify_checkpoint(plan.checkpoint)["fingerprint"],
        "held-out set": _digest(heldout),
        "config": {group: fields for group, fields in config.to_json().items() if group != "mesh"},
    }
    cells = []
    for size, seed in [(0, None), *((size, seed) for size in plan.sizes for seed in plan.seeds)]:
        name = "size-0" if seed is None else f"size-{size}-seed-{seed}"
        folder = plan.output_path / name
        subset = [] if seed is None else subsets[seed][:size]
        asked = {**request, "training set": hashlib.sha256("".join(map(_to_line, subset)).encode()).hexdigest()}
        scores = _read_result(folder / RESULT, asked)
        if scores is None:
            logger.info("few-shot: %s", name)
            folder.mkdir(parents=True, exist_ok=True)
            scores = measure_start() if seed is None else train(size, seed, folder)
            write_json(folder / RESULT, {"schema": SCHEMA, "request": asked, "scores": scores})
        if not plan.keep_runs:
            shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        cells.append({"size": size, "seed": seed, "scores": scores})
    return cells


def summarise_cells(cells: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[int, dict[str, dict[str, float]]]:
    """Size → score → {mean, std over the seeds (n − 1 in the denominator), seeds}; std is absent with one seed."""
    table: dict[int, dict[str, dict[str, float]]] = {}
    for size in sorted({cell["size"] for cell in cells}):
        row = table[size] = {}
        for name in names:
            values = [cell["scores"][name] for cell in cells if cell["size"] == size]
            row[name] = {"mean": statistics.fmean(values), "seeds": len(values)}
            if len(values) > 1:
                row[name]["std"] = statistics.stdev(values)
    return table


def choose_pairs(pairs: Iterable[Document], size: int, seeds: Sequence[int]) -> dict[int, list[Document]]:
    """For each seed `size` different pairs in an order of the seed's own, in bounded memory.

    The order is that of a hash of seed and pair: the first ten are part of the first hundred, and neither the order of
    the file nor the other pairs in it change which of two comes first.
    """
    kept: dict[int, dict[bytes, Document]] = {seed: {} for seed in seeds}
    for pair in pairs:
        for seed, chosen in kept.items():
            chosen[hashlib.blake2b(f"{seed}\0{pair.text}\0{pair.title}".encode(), digest_size=16).digest()] = pair
            if len(chosen) >= 2 * size + 1000:
                kept[seed] = _smallest(chosen, size)
    return {seed: list(_smallest(chosen, size).values()) for seed, chosen in kept.items()}


def _smallest(chosen: dict[bytes, Document], size: int) -> dict[bytes, Document]:
    return dict(heapq.nsmallest(size, chosen.items(), key=lambda item: item[0]))


def _usable(path: Path) -> Iterator[Document]:
    """Pairs as training would take them: cleaned, with two sides; what is left out until then is logged."""
    dropped: Counter[str] = Counter()
    try:
        for document in read_pairs(check_pair_paths([path]), dropped):
            text, title = clean_text(document.text), clean_text(document.title or "")
            if text and title:
                yield Document(document.id, text, title=title)
            else:
                dropped[NOT_A_PAIR] += 1
    finally:
        if dropped:
            logger.warning("%s: left out %s", path, describe_dropped(dropped))


def _first(pairs: Iterator[Document], count: int) -> list[Document]:
    found = [pair for pair, _ in zip(pairs, range(count))]
    if not found:
        raise DataError("no held-out pair can be used; give lines {text, summary} or title<TAB>text")
    return found


def _to_line(pair: Document) -> str:
    return json.dumps({"text": pair.text, "summary": pair.title}, ensure_ascii=False) + "\n"


def _write_pairs(path: Path, pairs: Iterable[Document]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(_to_line, pairs)), encoding="utf-8")
    temporary.replace(path)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_result(path: Path, asked: dict[str, Any]) -> dict[str, float] | None:
    """The scores of a cell that is done, None if it is not.

    Raises:
        ArtifactError: if it was made of something else.
    """
    if not path.is_file():
        return None
    record, asked = read_json(path), json.loads(json.dumps(asked))
    made_with = record["request"]
    config = RunConfig.from_json(made_with["config"]).to_json()
    way_out = f"choose another --output-path, or delete {path.parent} to make it anew"
    for group, fields in asked["config"].items():
        for field, value in fields.items():
            found = json.loads(json.dumps(config[group][field]))
            if found != value:
                raise ArtifactError(f"{path} was made with {group}.{field}={found!r}, got {value!r}; {way_out}")
    for name in ("checkpoint", "training set", "held-out set"):
        if made_with[name] != asked[name]:
            raise ArtifactError(
                f"{path} was made with the {name} of sha256 {made_with[name][:12]}…, got {asked[name][:12]}…; {way_out}"
            )
    return record["scores"]
