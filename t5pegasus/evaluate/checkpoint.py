"""How good a checkpoint is on pairs: held-out loss, scores of what it writes, the best of several candidates."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.data.records import Example
from t5pegasus.evaluate.bootstrap import Bootstrap
from t5pegasus.evaluate.heldout import measure_heldout_loss
from t5pegasus.evaluate.pairs import clean_pairs
from t5pegasus.evaluate.results import LEAD, Scores, compare_systems
from t5pegasus.generate.summarize import Summarizer
from t5pegasus.progress import Progress
from t5pegasus.text.read import Document
from t5pegasus.text.rouge import first_sentence, normalise_for_rouge, score_rouge

_PORTION_BATCHES = 16
"""Texts are sorted by length within so many batches; progress is shown after each portion."""


def evaluate_checkpoint(
    checkpoint: Path,
    summarizer: Summarizer,
    documents: Iterable[Document],
    dropped: Counter[str],
    *,
    pairs_path: Path,
    bootstrap: Bootstrap,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Score a checkpoint on pairs (documents whose title is the reference).

    Args:
        checkpoint: its folder.
        summarizer: loaded from it, with the options to write with; with `num_return` above 1 the first candidate is
            the model's summary, and the best one by rouge-l is scored as `oracle`, too.
        documents: cleaned here as in training; those with an empty side are left out and counted.
        dropped: pairs left out before, by reason, to be reported together.
        pairs_path: where the pairs are from, to be named.
        bootstrap: how to make intervals.

    Returns:
        The scores, and per pair what `compare_systems` says of it, with its `candidates` if there are several.

    Raises:
        DataError: if no pair is left.
    """
    info = load_checkpoint_info(checkpoint)
    pairs = clean_pairs(documents, dropped)
    data, tokenizer = info.config.data, summarizer.tokenizer
    examples = [
        Example(
            np.array(tokenizer.encode_source(pair.source, data.max_source_tokens), np.int32),
            np.array(tokenizer.encode_target(pair.reference, data.max_target_tokens), np.int32),
        )
        for pair in pairs
    ]
    whole = [len(tokenizer.encode_source(pair.source, sys.maxsize)) for pair in pairs]
    heldout = measure_heldout_loss(info.config, summarizer.parameters, examples, summarizer.batch_size)
    candidates = _write_candidates(summarizer, [pair.source for pair in pairs])
    outputs = {"model": [texts[0] for texts in candidates]}
    if summarizer.options.num_return > 1:
        outputs["oracle"] = [choose_best(pair.reference, texts) for pair, texts in zip(pairs, candidates)]
    outputs[LEAD] = [first_sentence(pair.source) for pair in pairs]
    comparison = compare_systems(pairs, outputs, bootstrap)
    if "oracle" in outputs:
        for record, texts in zip(comparison.records, candidates):
            record["candidates"] = texts
    scores = Scores(
        checkpoint=str(checkpoint),
        step=info.step,
        summaries_path=None,
        pairs_path=str(pairs_path),
        num_pairs=len(pairs),
        dropped=dict(dropped),
        num_truncated=sum(length > summarizer.max_source_tokens for length in whole),
        heldout_loss=heldout["loss"],
        heldout_accuracy=heldout["accuracy"],
        generation=dataclasses.asdict(summarizer.options),
        **comparison.fields,
    )
    return scores, comparison.records


def choose_best(reference: str, candidates: Sequence[str]) -> str:
    """The candidate with the highest rouge-l, the first of several."""
    wanted = normalise_for_rouge(reference)
    return max(candidates, key=lambda text: score_rouge(wanted, normalise_for_rouge(text)).rouge_l)


def _write_candidates(summarizer: Summarizer, sources: Sequence[str]) -> list[list[str]]:
    candidates: list[list[str]] = []
    portion = _PORTION_BATCHES * summarizer.batch_size
    with Progress("summarize", total=len(sources), unit="texts") as progress:
        for first in range(0, len(sources), portion):
            texts = sources[first : first + portion]
            written = summarizer.summarize_n_best(texts, first)
            candidates += [[summary.text for summary in summaries] for summaries in written]
            progress.advance(len(texts))
    return candidates
