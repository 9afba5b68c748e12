"""What beam search does with hypotheses that end, and when it stops.

All of them look at the 2K best continuations of the K running hypotheses of a row, best first. A score is
Σ log p / length ** length_penalty; the length counts the end token, but neither the start token nor a prefix. `Pool`
collects the hypotheses that end among the K best continuations, the best K of them, while the K best that do not end
run on. A row is done when nothing running can still beat the worst of a full pool, for which an attainable score is
compared with it; there the names differ:

- `exact`: by the best score that a hypothesis can still reach, whatever it goes on to write. Its log p never rises,
  so that is Σ log p / max_new_tokens ** length_penalty for a positive penalty, else Σ log p / (length + 1) **
  length_penalty. What is still running at `max_new_tokens` competes with the pool as it is, all K of it. With one beam
  and length_penalty 0 this is greedy search.
- `huggingface` (transformers' `early_stopping=False`, its default): by Σ log p / length ** length_penalty of the best
  running hypothesis, as if it were to get no longer; with a positive penalty this stops before the best is found.
- `huggingface-never` (`early_stopping="never"`): for a positive penalty as `exact`, else as `huggingface`.
- `huggingface-early` (`early_stopping=True`): as `huggingface`, and in any case when the pool is full.

The last three take, at `max_new_tokens`, the K best continuations as ended whatever their last token. `bert4keras`
(`AutoRegressiveDecoder.beam_search`) has no pool: see `BestEnds`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5pegasus.generate.options import Generated, GenerationOptions


class Candidates(NamedTuple):
    """The best continuations of the running hypotheses of every row, best first: C = 2K of them."""

    sums: jax.Array
    """[B, C]: Σ log p; -inf where there is none."""
    ends: jax.Array
    """bool [B, C]: the last token is the end token."""
    tokens: jax.Array
    """int32 [B, C, L], from the start token on."""


class Finalisation(Protocol):
    """The decisions of a search; its state is any pytree. `length` counts the tokens after the prefix."""

    def gain(self, log_probabilities: jax.Array) -> jax.Array:
        """What a token adds to the sum of its hypothesis."""
        ...

    def start(self, active: jax.Array, tokens: jax.Array, dtype: Any) -> Any:
        """The state before the first step.

        Args:
            active: bool [B], False in empty rows.
            tokens: int32 [B, K, L] in which nothing is written yet.
            dtype: of sums and scores.
        """
        ...

    def receive(self, state: Any, found: Candidates, length: jax.Array) -> tuple[Any, jax.Array]:
        """Take what ends; returns the sums [B, C] of what runs on, -inf elsewhere."""
        ...

    def settle(self, state: Any, running_sums: jax.Array, length: jax.Array) -> Any:
        """Close the rows that are done, once the running hypotheses [B, K], best first, are known."""
        ...

    def is_open(self, state: Any) -> jax.Array:
        """Bool [B]: rows whose result may still change."""
        ...

    def finish(self, state: Any, tokens: jax.Array, running_sums: jax.Array, length: jax.Array) -> Generated:
        """The result, given what was running at the end; tokens still with the start token, lengths without prefix."""
        ...


class _PoolState(NamedTuple):
    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    """[B, K], descending; -inf where there is no hypothesis."""
    is_open: jax.Array


class Pool:
    """Finalisation by a pool of ended hypotheses: `exact` and those of Hugging Face."""

    def __init__(self, options: GenerationOptions):
        self.options = options
        self.exact = options.finalisation == "exact"

    def gain(self, log_probabilities: jax.Array) -> jax.Array:
        """Log p itself."""
        return log_probabilities

    def start(self, active: jax.Array, tokens: jax.Array, dtype: Any) -> _PoolState:
        """An empty pool."""
        nothing = jnp.full(tokens.shape[:2], -jnp.inf, dtype)
        return _PoolState(tokens, jnp.zeros(tokens.shape[:2], jnp.int32), nothing, active)

    def receive(self, state: _PoolState, found: Candidates, length: jax.Array) -> tuple[_PoolState, jax.Array]:
        """Let those among the K best that end join the pool."""
        stops = found.ends if self.exact else found.ends | (length == self.options.max_new_tokens)
        among_best = jnp.arange(found.sums.shape[1]) < self.options.num_beams
        joins = stops & among_best[None] & state.is_open[:, None]
        scores = jnp.where(joins, normalise(found.sums, length, self.options), -jnp.inf)
        return _join(state, found.tokens, length, scores), jnp.where(found.ends, -jnp.inf, found.sums)

    def settle(self, state: _PoolState, running_sums: jax.Array, length: jax.Array) -> _PoolState:
        """Close the rows in which nothing running can join the pool any more."""
        options, worst = self.options, state.scores[:, -1]
        if options.length_penalty > 0 and options.finalisation in ("exact", "huggingface-never"):
            reached = jnp.asarray(options.max_new_tokens)
        else:
            reached = length + 1 if self.exact else length
        still_open = state.is_open & (normalise(running_sums[:, 0], reached, options) > worst)
        if options.finalisation == "huggingface-early":
            still_open &= worst == -jnp.inf
        return state._replace(is_open=still_open)

    def is_open(self, state: _PoolState) -> jax.Array:
        """Bool [B]: the pool may still change."""
        return state.is_open

    def finish(self, state: _PoolState, tokens: jax.Array, running_sums: jax.Array, length: jax.Array) -> Generated:
        """The pool; for `exact` with what is still running at the limit."""
        if self.exact:
            at_limit = (length == self.options.max_new_tokens) & state.is_open[:, None]
            scores = jnp.where(at_limit, normalise(running_sums, length, self.options), -jnp.inf)
            state = _join(state, tokens, length, scores)
        return Generated(state.tokens, state.lengths, state.scores)


class _BestState(NamedTuple):
    tokens: jax.Array
    """int32 [B, 1, L]."""
    lengths: jax.Array
    sums: jax.Array
    width: jax.Array
    """int32 [B]: hypotheses that may still run."""
    is_open: jax.Array


class BestEnds:
    """Finalisation of bert4keras: a row is done as soon as the best of its continuations ends, and that is its output.

    A continuation that ends without being the best is dropped, and from then on one hypothesis less is kept. Sums are
    not normalised when hypotheses are compared (`length_penalty` is of the reported score only), and of
    log(p + 1e-12). Below `min_new_tokens` the end token is forbidden here, whereas bert4keras's `minlen` lets a
    hypothesis write on behind it.
    """

    def __init__(self, options: GenerationOptions):
        self.options = options

    def gain(self, log_probabilities: jax.Array) -> jax.Array:
        """Log (p + 1e-12)."""
        floored = jnp.log(jnp.exp(log_probabilities) + 1e-12)
        return jnp.where(log_probabilities > -jnp.inf, floored, -jnp.inf)

    def start(self, active: jax.Array, tokens: jax.Array, dtype: Any) -> _BestState:
        """No output yet, and the full width."""
        num_rows, num_beams = tokens.shape[:2]
        return _BestState(
            tokens=tokens[:, :1],
            lengths=jnp.zeros((num_rows, 1), jnp.int32),
            sums=jnp.full((num_rows, 1), -jnp.inf, dtype),
            width=jnp.full(num_rows, num_beams, jnp.int32),
            is_open=active,
        )

    def receive(self, state: _BestState, found: Candidates, length: jax.Array) -> tuple[_BestState, jax.Array]:
        """Take the best if it ends, drop the others that do."""
        kept = (jnp.arange(found.sums.shape[1])[None] < state.width[:, None]) & (found.sums > -jnp.inf)
        runs = kept & ~found.ends
        done = state.is_open & found.ends[:, 0]
        state = _take(state, done, found.tokens, found.sums, length)
        width = jnp.sum(runs, axis=1, dtype=jnp.int32)
        return state._replace(width=width, is_open=state.is_open & ~done), jnp.where(runs, found.sums, -jnp.inf)

    def settle(self, state: _BestState, running_sums: jax.Array, length: jax.Array) -> _BestState:
        """Nothing more: a row is done when its output is taken."""
        return state

    def is_open(self, state: _BestState) -> jax.Array:
        """Bool [B]: there is no output yet."""
        return state.is_open

    def finish(self, state: _BestState, tokens: jax.Array, running_sums: jax.Array, length: jax.Array) -> Generated:
        """The outputs; at the limit the best that is running."""
        state = _take(state, state.is_open, tokens, running_sums, length)
        scores = normalise(state.sums, jnp.maximum(state.lengths, 1), self.options)
        return Generated(state.tokens, state.lengths, scores)


def normalise(sums: jax.Array, length: jax.Array, options: GenerationOptions) -> jax.Array:
    """Σ log p → score."""
    return sums / length.astype(sums.dtype) ** options.length_penalty


def _join(state: _PoolState, tokens: jax.Array, length: jax.Array, scores: jax.Array) -> _PoolState:
    """The best K of the pool and of hypotheses of one length; of equals the pool's first."""
    joined_tokens = jnp.concatenate([state.tokens, tokens], axis=1)
    joined_lengths = jnp.concatenate([state.lengths, jnp.broadcast_to(length, scores.shape)], axis=1)
    best, places = jax.lax.top_k(jnp.concatenate([state.scores, scores], axis=1), state.scores.shape[1])
    return state._replace(
        tokens=jnp.take_along_axis(joined_tokens, places[..., None], axis=1),
        lengths=jnp.take_along_axis(joined_lengths, places, axis=1),
        scores=best,
    )


def _take(state: _BestState, rows: jax.Array, tokens: jax.Array, sums: jax.Array, length: jax.Array) -> _BestState:
    """The best of [B, C] as the output of these rows, bool [B]."""
    return state._replace(
        tokens=jnp.where(rows[:, None, None], tokens[:, :1], state.tokens),
        lengths=jnp.where(rows[:, None], length, state.lengths),
        sums=jnp.where(rows[:, None], sums[:, :1], state.sums),
    )
