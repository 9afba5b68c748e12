"""The loss of the output head over parts of the vocabulary, so that the logits are never there as a whole.

Forward, the normaliser is summed part by part against a running maximum (Milakov & Gimelshein 2018); backward, the
logits of each part are computed anew, and with them its gradient. On a mesh each device has its own part of the
vocabulary, cut into chunks; of a head that is split over `fsdp` one chunk is gathered at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5pegasus.sharding import RULES, partition_spec
from t5pegasus.train.loss import LossSums


class ChunkedHead(NamedTuple):
    """What is known of the head when the program is made; hashable."""

    num_open_tokens: int
    """Tokens behind these have probability 0."""
    chunk_size: int
    """Entries of a device's part of the vocabulary whose logits are there at once."""
    with_uniform: bool
    """Whether the sums have what label smoothing needs."""


def sum_chunked_losses(
    states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, how: ChunkedHead
) -> LossSums:
    """What `loss.sum_losses` gives of the logits states · head, without these.

    Args:
        states: [b, t, embed] in the compute dtype.
        head: [embed, vocab], the parameter as it is kept; each chunk is cast.
        targets: int32 [b, t].
        weights: float32 [b, t], 0 on padding. No gradient is taken of them.
        how: chunks, masked tokens, and what to sum.
    """
    sums, nll_by_row = cast(Any, _sums(states, head, targets, weights, how))
    return LossSums(*sums[: 5 if how.with_uniform else 4])._replace(nll_by_row=nll_by_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, how: ChunkedHead) -> Any:
    return _forward(states, head, targets, weights, how)[0]


def _forward(states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, how: ChunkedHead) -> Any:
    by_row = PartitionSpec(RULES["batch"], None)
    run = _over_devices(
        functools.partial(_sum_part, how=how),
        (PartitionSpec(RULES["batch"], None, None), partition_spec("embed", "vocab"), by_row, by_row),
        (PartitionSpec(), by_row, PartitionSpec(RULES["batch"])),
    )
    sums, log_normaliser, nll_by_row = run(states, head, targets, weights)
    return (sums, nll_by_row), (states, head, targets, weights, log_normaliser)


def _backward(how: ChunkedHead, residuals: Any, cotangents: Any) -> Any:
    by_row, by_state = PartitionSpec(RULES["batch"], None), PartitionSpec(RULES["batch"], None, None)
    of_head = partition_spec("embed", "vocab")
    run = _over_devices(
        functools.partial(_differentiate_part, how=how),
        (by_state, of_head, by_row, by_row, by_row, PartitionSpec()),
        (by_state, of_head),
    )
    return (*run(*residuals, cotangents[0]), None, None)  # what rows have is for people to read


_sums.defvjp(_forward, _backward)


class _Axes(NamedTuple):
    """Names of mesh axes; None without a mesh."""

    batch: Any = None
    embed: Any = None
    vocab: Any = None

    def apply(self, collective: Callable, x: Any, over: str, **options: Any) -> Any:
        """A collective over one of these, if there is a mesh."""
        name = getattr(self, over)
        return x if name is None else collective(x, name, **options)

    def first_entry(self, head: jax.Array) -> Any:
        """Where in the vocabulary this device's part begins."""
        return 0 if self.vocab is None else jax.lax.axis_index(self.vocab) * head.shape[1]


def _over_devices(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(function, axes=_Axes())
    axes = _Axes(RULES["batch"], RULES["embed"], RULES["vocab"])
    # The collectives of both directions are written out here, so their variance is not for JAX to derive.
    return jax.shard_map(
        functools.partial(function, axes=axes), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _for_each_chunk(carry: Any, size: int, chunk_size: int, body: Callable[[Any, Any, int], Any]) -> Any:
    """`body(carry, start, size) -> carry` over [0, size) in chunks, the last of them perhaps smaller."""
    count, rest = divmod(size, chunk_size)
    if count:
        carry = jax.lax.fori_loop(0, count, lambda index, carry: body(carry, index * chunk_size, chunk_size), carry)
    return body(carry, count * chunk_size, rest) if rest else carry


def _logits_of(
    states: jax.Array, head: jax.Array, start: Any, size: int, how: ChunkedHead, axes: _Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits [b, t, size], the gathered chunk of the head [embed, size], its entries' tokens [1, 1, size])."""
    chunk = jax.lax.dynamic_slice_in_dim(head, start, size, axis=1).astype(states.dtype)
    chunk = axes.apply(jax.lax.all_gather, chunk, "embed", axis=0, tiled=True)
    wide = jnp.promote_types(states.dtype, jnp.float32)
    logits = jnp.einsum("btd,dv->btv", states, chunk, preferred_element_type=wide)
    tokens = (axes.first_entry(head) + start + jnp.arange(size, dtype=jnp.int32))[None, None]
    return jnp.where(tokens < how.num_open_tokens, logits, jnp.finfo(wide).min / 2), chunk, tokens


def _sum_part(
    states: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, *, how: ChunkedHead, axes: _Axes
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The five sums, the logarithm of the normaliser [b, t], and the first sum by row [b]."""
    wide = jnp.promote_types(states.dtype, jnp.float32)
    lowest = jnp.full(targets.shape, -jnp.inf, wide)
    zeros = jnp.zeros(targets.shape, wide)

    def body(carry: Any, start: Any, size: int) -> Any:
        maximum, total, best, target_logit, logit_sum = carry
        logits, _, tokens = _logits_of(states, head, start, size, how, axes)
        highest = jnp.max(logits, axis=-1)
        # The first of the highest, as an arg max over all of them would choose.
        best = jnp.where(highest > maximum, tokens[0, 0, 0] + jnp.argmax(logits, axis=-1).astype(jnp.int32), best)
        new_maximum = jnp.maximum(maximum, highest)
        total = total * jnp.exp(maximum - new_maximum) + jnp.sum(jnp.exp(logits - new_maximum[..., None]), axis=-1)
        target_logit += jnp.sum(jnp.where(tokens == targets[..., None], logits, 0), axis=-1)
        if how.with_uniform:
            logit_sum += jnp.sum(jnp.where(tokens < how.num_open_tokens, logits, 0), axis=-1)
        return new_maximum, total, best, target_logit, logit_sum

    start = (lowest, zeros, jnp.zeros_like(targets), zeros, zeros)
    own_maximum, total, best, target_logit, logit_sum = _for_each_chunk(start, head.shape[1], how.chunk_size, body)
    maximum = axes.apply(jax.lax.pmax, own_maximum, "vocab")
    total = axes.apply(jax.lax.psum, total * jnp.exp(own_maximum - maximum), "vocab")
    best = jnp.where(own_maximum == maximum, best, jnp.iinfo(jnp.int32).max)
    best = axes.apply(jax.lax.pmin, best, "vocab")
    target_logit = axes.apply(jax.lax.psum, target_logit, "vocab")
    log_normaliser = maximum + jnp.log(total)
    mean_logit = axes.apply(jax.lax.psum, logit_sum, "vocab") / how.num_open_tokens
    per_token = (
        log_normaliser - target_logit,
        jnp.square(log_normaliser),
        best == targets,
        jnp.ones_like(weights),
        log_normaliser - mean_logit,
    )
    sums = tuple(axes.apply(jax.lax.psum, jnp.sum(weights * each), "batch") for each in per_token)
    return sums, log_normaliser, jnp.sum(weights * per_token[0], axis=-1)


def _differentiate_part(
    states: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    log_normaliser: jax.Array,
    cotangents: tuple[jax.Array, ...],
    *,
    how: ChunkedHead,
    axes: _Axes,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of states and head.

    With the cotangents c of the sums and a target t, the gradient of the logit of v is the target's weight times

        (c_nll + 2·c_z·log Z + c_uniform)·p_v − c_nll·[v = t] − c_uniform / number of open tokens.
    """
    of_nll, of_z, _, _, of_uniform = cotangents
    of_uniform = of_uniform if how.with_uniform else jnp.zeros_like(of_nll)
    of_probability = weights * (of_nll + 2 * of_z * log_normaliser + of_uniform)

    def body(carry: Any, start: Any, size: int) -> Any:
        state_gradient, head_gradient = carry
        logits, chunk, tokens = _logits_of(states, head, start, size, how, axes)
        gradient = of_probability[..., None] * jnp.exp(logits - log_normaliser[..., None])
        gradient -= jnp.where(tokens == targets[..., None], (weights * of_nll)[..., None], 0)
        if how.with_uniform:
            gradient -= (weights * of_uniform)[..., None] / how.num_open_tokens
        gradient = jnp.where(tokens < how.num_open_tokens, gradient, 0).astype(states.dtype)
        state_gradient += jnp.einsum("btv,dv->btd", gradient, chunk, preferred_element_type=logits.dtype)
        of_chunk = jnp.einsum("btd,btv->dv", states, gradient, preferred_element_type=logits.dtype)
        of_chunk = axes.apply(jax.lax.psum_scatter, of_chunk, "embed", scatter_dimension=0, tiled=True)
        of_chunk = of_chunk.astype(head.dtype)
        return state_gradient, jax.lax.dynamic_update_slice_in_dim(head_gradient, of_chunk, start, axis=1)

    start = jnp.zeros(states.shape, log_normaliser.dtype), jnp.zeros_like(head)
    state_gradient, head_gradient = _for_each_chunk(start, head.shape[1], how.chunk_size, body)
    others = [name for name in axes.batch or () if name != axes.embed]
    head_gradient = jax.lax.psum(head_gradient, others) if others else head_gradient
    return axes.apply(jax.lax.psum, state_gradient, "vocab").astype(states.dtype), head_gradient
