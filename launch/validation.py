"""Summaries that a model writes for held-out text while it is being trained: their scores, and a few to read."""

import difflib
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError

if TYPE_CHECKING:
    from t5pegasus.train.agreement import Check
    from t5pegasus.train.evaluation import Sampler, Scorer

_BATCH_SIZE = 32
_SHOWN_SCORES = ("rouge-1", "rouge-2", "rouge-l")
"""Beside a sample; ROUGE-1 is F1 of characters."""


def make_scorer(config: RunConfig, tokenizer_path: Path, pairs_path: Path | None) -> "Scorer | None":
    """What `config.train.keep_best` asks for, if it is a score of summaries; None if a loss will do.

    The summaries are written greedily, as long as the targets of training, of the first `max_scored_pairs` pairs.

    Args:
        config: of the run.
        tokenizer_path: of the checkpoint that is trained.
        pairs_path: held-out pairs; read once.

    Raises:
        UsageError: if there is no such score, or there are no pairs.
    """
    from t5pegasus.evaluate import DEFINITIONS
    from t5pegasus.train.evaluation import LOSSES

    name = config.train.keep_best
    if name is None or name in LOSSES:
        return None
    if name not in DEFINITIONS:
        known = [*LOSSES, *DEFINITIONS]
        near = difflib.get_close_matches(name, known, n=1)
        way_out = f"perhaps you meant {near[0]!r}" if near else f"choose one of {', '.join(known)}"
        raise UsageError(f"train.keep_best={name!r} is no score; {way_out}")
    if pairs_path is None:
        raise UsageError(f"train.keep_best={name!r} scores summaries of held-out pairs; give --heldout-path PAIRS")
    return score_summaries_of(config, tokenizer_path, pairs_path, config.train.max_scored_pairs)


def score_summaries_of(config: RunConfig, tokenizer_path: Path, pairs_path: Path, max_pairs: int) -> "Scorer":
    """A scorer of greedy summaries of the first pairs of a file."""
    from t5pegasus.corpus.pairs import check_pair_paths, read_pairs
    from t5pegasus.evaluate import DEFINITIONS, score_pairs
    from t5pegasus.evaluate.pairs import clean_pairs
    from t5pegasus.generate.options import GenerationOptions
    from t5pegasus.generate.summarize import Summarizer
    from t5pegasus.text.tokenizer import load_tokenizer
    from t5pegasus.train.compute_dtype import resolve_compute_dtype
    from t5pegasus.train.evaluation import Scorer

    dropped: Counter[str] = Counter()
    documents = read_pairs(check_pair_paths([pairs_path]), dropped)
    pairs = clean_pairs(itertools.islice(documents, max_pairs), dropped)
    sources, references = [pair.source for pair in pairs], [pair.reference for pair in pairs]
    tokenizer = load_tokenizer(tokenizer_path)

    scored = hashlib.sha256(repr(list(zip(sources, references))).encode()).hexdigest()

    def score(parameters: Mapping[str, Any], check: "Check") -> dict[str, float]:
        summarizer = Summarizer(
            model=config.model,
            parameters=parameters,
            tokenizer=tokenizer,
            options=GenerationOptions(config.data.max_target_tokens),
            max_source_tokens=config.data.max_source_tokens,
            compute_dtype=str(resolve_compute_dtype(config)),
            batch_size=_BATCH_SIZE,
        )
        written = summarizer.summarize(sources, before_batch=check)
        return score_pairs(references, [summary.text for summary in written])

    return Scorer(tuple(DEFINITIONS), score, scored)


def make_sampler(config: RunConfig, examples_path: Path, heldout_path: Path | None) -> "Sampler | None":
    """What `config.train.sample_every_steps` asks for: greedy summaries of the first held-out examples; or None.

    They are read as they are trained on, tokens that the tokenizer makes text of again.

    Args:
        config: of the run.
        examples_path: what is trained on; its `heldout` is taken where no other is given.
        heldout_path: held-out examples.
    """
    heldout_path = heldout_path or examples_path / "heldout"
    if not config.train.sample_every_steps or not heldout_path.exists():
        return None  # what is missing `train_run` says
    from t5pegasus.data.shards import ExampleShards
    from t5pegasus.evaluate.scores import PAIR_SCORES, score_pair
    from t5pegasus.generate.options import GenerationOptions
    from t5pegasus.generate.summarize import Summarizer
    from t5pegasus.text.tokenizer import load_tokenizer
    from t5pegasus.train.compute_dtype import resolve_compute_dtype

    tokenizer = load_tokenizer(examples_path / "tokenizer")
    with ExampleShards(heldout_path) as shards:
        if shards.corruption is not None:
            raise UsageError(
                f"train.sample_every_steps={config.train.sample_every_steps}: {heldout_path} holds texts for span "
                "corruption, which have no summaries; give --heldout-path with those that have, or leave it out"
            )
        examples = shards.read(range(min(config.train.num_samples, len(shards))))
    sources, references = (
        [tokenizer.decode(tokens.tolist()) for tokens in texts]
        for texts in ([example.source for example in examples], [example.target for example in examples])
    )

    def sample(config: RunConfig, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        summarizer = Summarizer(
            model=config.model,
            parameters=parameters,
            tokenizer=tokenizer,
            options=GenerationOptions(config.data.max_target_tokens),
            max_source_tokens=config.data.max_source_tokens,
            compute_dtype=str(resolve_compute_dtype(config)),
            batch_size=_BATCH_SIZE,
        )
        written = [summary.text for summary in summarizer.summarize(sources)]
        samples = []
        for source, reference, summary in zip(sources, references, written):
            scores = dict(zip(PAIR_SCORES, score_pair(reference, summary)))
            shown = {name: 100 * scores[name] for name in _SHOWN_SCORES}
            samples.append({"source": source, "reference": reference, "summary": summary, "scores": shown})
        return samples

    return sample
