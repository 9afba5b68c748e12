"""Scores of summaries that are there already, whoever wrote them; needs no model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5pegasus.errors import DataError
from t5pegasus.evaluate.bootstrap import Bootstrap
from t5pegasus.evaluate.pairs import clean_pairs, read_summaries
from t5pegasus.evaluate.results import LEAD, Scores, compare_systems
from t5pegasus.text.read import Document
from t5pegasus.text.rouge import first_sentence


def evaluate_summaries(
    path: Path,
    documents: Sequence[Document],
    dropped: Counter[str],
    max_examples: int | None = None,
    *,
    pairs_path: Path,
    bootstrap: Bootstrap,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Score the summaries in a file on pairs (documents whose title is the reference).

    Args:
        path: lines of JSON or text, as `read_summaries` takes them.
        documents: all pairs of the file they were written for; those with an empty side are left out and counted.
        dropped: pairs left out before, by reason, to be reported together.
        max_examples: score only so many documents, the first ones.
        pairs_path: where the pairs are from, to be named.
        bootstrap: how to make intervals.

    Returns:
        The scores, and per pair what `compare_systems` says of it.

    Raises:
        DataError: if no pair can be used, or summaries and pairs do not belong together.
    """
    given = read_summaries(path, documents)
    pairs = clean_pairs(documents[:max_examples], dropped)
    missing = [pair.id for pair in pairs if pair.id not in given]
    if missing:
        raise DataError(f"{path} has no summary for {len(missing):,} pairs, {missing[0]!r} for one; add them")
    outputs = {
        "summaries": [given[pair.id] for pair in pairs],
        LEAD: [first_sentence(pair.source) for pair in pairs],
    }
    comparison = compare_systems(pairs, outputs, bootstrap)
    scores = Scores(
        checkpoint=None,
        step=None,
        summaries_path=str(path),
        pairs_path=str(pairs_path),
        num_pairs=len(pairs),
        dropped=dict(dropped),
        num_truncated=None,
        heldout_loss=None,
        heldout_accuracy=None,
        generation=None,
        **comparison.fields,
    )
    return scores, comparison.records
