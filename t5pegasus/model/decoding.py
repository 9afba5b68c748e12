"""Decoding token by token with a cache, several hypotheses of a source side by side.

The hypotheses of a source are the query positions of one attention, so its keys and values, of the source and of
what was written, are there once per source. What a hypothesis wrote stays where it was written: a search that lets
hypotheses branch and die moves only their lists of ancestors, from which follows what each of them sees.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from t5pegasus.model.attention import relative_bias
from t5pegasus.model.layers import Dropout
from t5pegasus.model.stack import DecoderLayer
from t5pegasus.model.t5 import T5
from t5pegasus.sharding import constrain

_NO_DROPOUT = Dropout(0.0, None)


class DecoderCache(NamedTuple):
    """What was written: for each layer the keys and values of all positions of all hypotheses of a source.

    Entry t·K + j of an axis of T·K is that of hypothesis slot j at position t.
    """

    keys: tuple[jax.Array, ...]
    """Per layer [batch, heads, d_kv, T·K]."""
    values: tuple[jax.Array, ...]
    """Per layer [batch, heads, T·K, d_kv]."""
    ancestors: jax.Array
    """int32 [batch, K, T]: the slot in which the hypothesis, or the one it comes from, wrote; -1 where nobody did."""

    def follow(self, parents: jax.Array) -> "DecoderCache":
        """Let hypothesis j go on from hypothesis `parents[:, j]`, int32 [batch, K]."""
        return self._replace(ancestors=jnp.take_along_axis(self.ancestors, parents[..., None], axis=1))


@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """The decoder over encoded sources. Create it outside the loop that calls it: all that no step changes is here."""

    model: T5
    layers: tuple[DecoderLayer, ...]
    """One module per layer, in the dtype it computes in: a loop would slice and cast stacked weights at every step."""
    cross_keys: tuple[jax.Array, ...]
    """Per layer [batch, heads, d_kv, source]."""
    cross_values: tuple[jax.Array, ...]
    """Per layer [batch, heads, source, d_kv]."""
    source_mask: jax.Array
    """bool [batch, source]: True on tokens, one source per row."""
    head: jax.Array
    """[embed, vocab]."""

    @classmethod
    def over(cls, model: T5, encoded: jax.Array, source_mask: jax.Array) -> "CachedDecoder":
        """Project the keys and values of encoded sources [batch, source, embed]."""
        layers = _unstack(model)
        crossed = [layer.cross_attention.project_keys_values(encoded) for layer in layers]
        keys, values = zip(*crossed)
        return cls(model, layers, keys, values, source_mask, model.head().astype(model.compute_dtype))

    @property
    def wide(self) -> Any:
        """The dtype of logits, and of what is summed from them."""
        return jnp.promote_types(self.model.compute_dtype, jnp.float32)

    def start(self, num_hypotheses: int, max_tokens: int) -> DecoderCache:
        """An empty cache for so many hypotheses per source and decoder positions."""
        slots = num_hypotheses * max_tokens
        ancestors = jnp.full((len(self.source_mask), num_hypotheses, max_tokens), -1, jnp.int32)
        keys = (jnp.zeros((*keys.shape[:3], slots), keys.dtype) for keys in self.cross_keys)
        values = (jnp.zeros((*v.shape[:2], slots, v.shape[3]), v.dtype) for v in self.cross_values)
        return DecoderCache(
            keys=tuple(constrain(each, "batch", "heads", "qk", "length") for each in keys),
            values=tuple(constrain(each, "batch", "heads", "length", "vo") for each in values),
            ancestors=constrain(ancestors, "batch", "length", "length"),
        )

    def step(self, cache: DecoderCache, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, DecoderCache]:
        """Read one token per hypothesis at one position: int32 [batch, K] → [batch, K, embed] and the new cache."""
        num_rows, num_hypotheses, max_tokens = cache.ancestors.shape
        model, config = self.model, self.model.config
        own = jnp.broadcast_to(jnp.arange(num_hypotheses)[None, :, None], (num_rows, num_hypotheses, 1))
        ancestors = jax.lax.dynamic_update_slice(cache.ancestors, own.astype(jnp.int32), (0, 0, position))
        seen = ancestors[..., None] == jnp.arange(num_hypotheses)[None, None, None]
        seen = seen.reshape(num_rows, num_hypotheses, -1)
        source_seen = self.source_mask[:, None]
        table = model.decoder.relative_bias[...]
        here, all_positions = position[None, None], jnp.arange(max_tokens)[None]
        bias = relative_bias(table, here, all_positions, config, bidirectional=False)
        bias = jnp.repeat(bias, num_hypotheses, axis=-1)
        cross_bias = model.cross_bias(here, jnp.arange(self.source_mask.shape[1])[None])
        x = model.embed(tokens)
        written_keys, written_values = [], []
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]

            def append(new_keys: jax.Array, new_values: jax.Array, keys=keys, values=values):
                update, first = jax.lax.dynamic_update_slice, position * num_hypotheses
                return update(keys, new_keys, (0, 0, 0, first)), update(values, new_values, (0, 0, first, 0))

            crossed = (self.cross_keys[index], self.cross_values[index])
            x, (keys, values) = layer(x, append, seen, bias, crossed, source_seen, cross_bias, _NO_DROPOUT)
            written_keys.append(keys)
            written_values.append(values)
        return x, DecoderCache(tuple(written_keys), tuple(written_values), ancestors)

    def logits(self, x: jax.Array) -> jax.Array:
        """What the last layer gave, [batch, K, embed] → float32 logits [batch, K, vocab]."""
        return self.model.read_out(x, self.head)


def _unstack(model: T5) -> tuple[DecoderLayer, ...]:
    """The layers one by one; their matrices in the compute dtype, their gains as they are (norms are wide)."""
    graph, state = nnx.split(cast(DecoderLayer, model.decoder.layers))
    flat = nnx.to_flat_state(state)

    def take(index: int) -> DecoderLayer:
        taken = []
        for path, variable in flat:
            array = variable[...][index]
            taken.append((path, variable.replace(array if variable.spec.gain else array.astype(model.compute_dtype))))
        return nnx.merge(graph, nnx.from_flat_state(taken))

    return tuple(take(index) for index in range(model.config.num_decoder_layers))
