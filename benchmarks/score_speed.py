"""CPU time to score summaries beside the packages that define the scores, in one thread and on the same pairs.

Ours are the eight scores of every pair; theirs are `rouge` 1.0.1 and nltk (the recipe of T5 PEGASUS' tables), then
rouge-score and sacreBLEU (the standard ones). The summaries are the first sentences of the texts.

    python benchmarks/score_speed.py --pairs-path ../shared/data/summarization/csl_dev.jsonl
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from t5pegasus.corpus.pairs import read_pairs
from t5pegasus.evaluate import score_pairs
from t5pegasus.text.clean import clean_text
from t5pegasus.text.rouge import first_sentence, normalise_for_rouge


def main() -> None:
    """Score by both sides and print figures and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs-path", type=Path, required=True)
    args = parser.parse_args()
    pairs = list(read_pairs([args.pairs_path], Counter()))
    references = [clean_text(pair.title or "") for pair in pairs]
    summaries = [first_sentence(clean_text(pair.text)) for pair in pairs]
    sides: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
        "t5pegasus": score_pairs,
        "rouge 1.0.1, nltk": score_by_published_recipe,
        "rouge-score, sacreBLEU": score_by_standard,
    }
    seconds: dict[str, float] = {}
    for name, score in sides.items():
        score(references[:2], summaries[:2])  # imports and first calls
        runs = []
        for _ in range(3):
            began = time.process_time()
            figures = score(references, summaries)
            runs.append(time.process_time() - began)
        seconds[name] = min(runs)
        print(f"{name:<24}{seconds[name]:8.2f} s  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    ours, *theirs = seconds.values()
    print(
        f"{len(pairs):,} pairs, {len(pairs) / ours:,.0f} a second; both packages: {sum(theirs) / ours:.1f} × the time"
    )


def score_by_published_recipe(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Means in percent by `rouge` 1.0.1 and nltk."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge import Rouge

    sys.setrecursionlimit(100_000)  # the package needs one call per character
    package, smooth = Rouge(), SmoothingFunction().method1
    totals = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu"), 0.0)
    for reference, summary in zip(references, summaries):
        wanted, given = (" ".join(text).lower() for text in (reference, summary))
        (found,) = package.get_scores(given, wanted)
        for metric, figures in found.items():
            totals[metric] += figures["f"]
        totals["bleu"] += sentence_bleu([wanted.split(" ")], given.split(" "), smoothing_function=smooth)
    return {name: 100 * total / len(references) for name, total in totals.items()}


def score_by_standard(references: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Means in percent by rouge-score on characters, and sacreBLEU's corpus BLEU."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer
    from sacrebleu.metrics.bleu import BLEU

    class Characters(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return list(normalise_for_rouge(text))

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())
    totals = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for reference, summary in zip(references, summaries):
        for metric, figures in scorer.score(reference, summary).items():
            totals[metric] += figures.fmeasure
    means = {name: 100 * total / len(references) for name, total in totals.items()}
    return means | {"bleu": BLEU(tokenize="zh").corpus_score(summaries, [references]).score}


if __name__ == "__main__":
    main()
