"""Search by definition: one source, Python lists, every hypothesis scored from scratch by a function."""

from collections.abc import Callable, Sequence

import numpy as np

from t5pegasus.generate.options import GenerationOptions

Hypothesis = tuple[float, tuple[int, ...]]
"""Sum or score, and the tokens after the prefix."""
LogProbabilities = Callable[[Sequence[tuple[int, ...]]], np.ndarray]
"""Of the next token, [number of hypotheses, V], for hypotheses of equal length (without start token and prefix)."""


def search(
    log_probabilities: LogProbabilities, before: Sequence[int], end: int, options: GenerationOptions
) -> list[Hypothesis]:
    """Scores and tokens, best first; `before` are the start token and the prefix."""
    if options.finalisation == "bert4keras":
        return [_search_until_best_ends(log_probabilities, before, end, options)]
    return _search_with_pool(log_probabilities, before, end, options)


def forbidden(before: Sequence[int], written: Sequence[int], end: int, options: GenerationOptions) -> set[int]:
    """Tokens that may not follow."""
    found = {end} if len(written) < options.min_new_tokens else set()
    tokens, size = [*before, *written], options.no_repeat_ngram_size
    for last in range(len(tokens)) if size else ():
        first = last - size + 1
        if first >= 0 and tokens[first:last] == tokens[len(tokens) - size + 1 :]:
            found.add(tokens[last])
    return found


def _continue(log_probabilities, running: list[Hypothesis], before, end, options, floor: float = 0.0):
    """All continuations, best first."""
    following = log_probabilities([tokens for _, tokens in running])
    found = []
    for (total, tokens), row in zip(running, following, strict=True):
        banned = forbidden(before, tokens, end, options)
        gains = np.log(np.exp(row) + floor) if floor else row
        found += [(total + float(gains[token]), (*tokens, token)) for token in range(len(row)) if token not in banned]
    return sorted(found, key=lambda item: -item[0])


def _search_with_pool(log_probabilities, before, end, options) -> list[Hypothesis]:
    width, limit, penalty = options.num_beams, options.max_new_tokens, options.length_penalty
    exact = options.finalisation == "exact"
    running, pool = [(0.0, ())], []
    for length in range(1, limit + 1):
        best = _continue(log_probabilities, running, before, end, options)[: 2 * width]
        running = [found for found in best if found[1][-1] != end][:width]
        ended = [found for found in best[:width] if found[1][-1] == end or (length == limit and not exact)]
        if exact and length == limit:
            ended += running
        pool += [(total / length**penalty, tokens) for total, tokens in ended]
        pool = sorted(pool, key=lambda item: -item[0])[:width]
        if len(pool) < width or not running:
            continue
        if options.finalisation == "huggingface-early":
            break
        reached = {"exact": length + 1, "huggingface": length, "huggingface-never": length}[options.finalisation]
        if penalty > 0 and options.finalisation != "huggingface":
            reached = limit
        if running[0][0] / reached**penalty <= pool[-1][0]:
            break
    return pool


def _search_until_best_ends(log_probabilities, before, end, options) -> Hypothesis:
    width, running = options.num_beams, [(0.0, ())]
    for _ in range(options.max_new_tokens):
        best = _continue(log_probabilities, running, before, end, options, floor=1e-12)[:width]
        if best[0][1][-1] == end:
            running = best
            break
        running = [found for found in best if found[1][-1] != end]
        width = len(running)
    total, tokens = running[0]
    return total / len(tokens) ** options.length_penalty, tokens
