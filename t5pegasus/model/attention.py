"""T5's attention: no 1/√d_kv (the query's initialisation carries it), a learned bias by bucketed distance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5pegasus.config import ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.attention_kernel import fused_attention, plain_attention
from t5pegasus.model.backward import project
from t5pegasus.model.execution import Execution
from t5pegasus.model.layers import Dropout, declare
from t5pegasus.model.sizes import axis_size
from t5pegasus.sharding import constrain


def relative_position_bucket(
    distance: jax.Array,
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
    boundaries: tuple[int, ...] = (),
) -> jax.Array:
    """The bucket of key position − query position (Raffel et al. 2020, §2.1), refined beyond the formula's range.

    Half of a direction's buckets are exact distances, the other half grow logarithmically up to `max_distance`;
    the encoder gives each direction half of all buckets, the decoder looks back only. Behind these stand the buckets
    of `boundaries`, in the encoder for each boundary one that looks back and one that looks ahead.

    Args:
        distance: int32, any shape.
        bidirectional: True in the encoder.
        num_buckets: the formula's buckets in all.
        max_distance: from here on, or a little before, the formula gives all distances the last bucket.
        boundaries: ascending distances; from each of them up to the next there is a bucket of its own.

    Returns:
        int32 of the same shape, in [0, num_buckets + directions · boundaries).
    """
    num_formula_buckets = num_buckets
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket += jnp.where(distance > 0, num_buckets, 0)
        back = jnp.abs(distance)
    else:
        back = jnp.maximum(-distance, 0)
    num_exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(back, 1).astype(jnp.float32) / num_exact) / math.log(max_distance / num_exact)
    logarithmic = num_exact + (ratio * (num_buckets - num_exact)).astype(jnp.int32)
    bucket += jnp.where(back < num_exact, back, jnp.minimum(logarithmic, num_buckets - 1))
    for index, boundary in enumerate(boundaries):
        own = num_formula_buckets + (2 * index + (distance > 0) if bidirectional else index)
        bucket = jnp.where(back >= boundary, own, bucket)
    return bucket


def refined_bucket_sources(before: ModelConfig, after: ModelConfig, stack: str) -> np.ndarray:
    """Which row of a stack's relative-bias table each row of a refined table is to copy, so that no bias changes.

    Args:
        before: the config of the table there is.
        after: the same bucket formula with further `relative_attention_boundaries`.
        stack: `encoder` or `decoder`.

    Returns:
        int64 [rows after], in [0, rows before). Where the boundaries of `before` are the first ones of `after`, the
        first rows are 0, 1, 2, …: those there were, in place.

    Raises:
        UsageError: if the formula differs, or `after` lacks a boundary of `before`.
    """
    for field in ("relative_attention_num_buckets", "relative_attention_max_distance"):
        if getattr(before, field) != getattr(after, field):
            raise UsageError(
                f"model.{field} is {getattr(before, field)}, got {getattr(after, field)}: another bucket formula would "
                "change the biases; refine the last bucket by relative_attention_boundaries instead"
            )
    old, new = before.relative_attention_boundaries, after.relative_attention_boundaries
    if not set(old) <= set(new):
        raise UsageError(
            f"model.relative_attention_boundaries is {old}, got {new}, which lacks {sorted(set(old) - set(new))}: "
            "distances with different biases would share a bucket; keep all of them and add further ones"
        )
    num_formula_buckets = before.relative_attention_num_buckets
    directions = 2 if stack == "encoder" else 1
    sources = list(range(num_formula_buckets))
    for boundary in new:
        passed = sum(each <= boundary for each in old)
        for direction in range(directions):
            last_of_formula = num_formula_buckets * (direction + 1) // directions - 1
            refined = num_formula_buckets + directions * (passed - 1) + direction
            sources.append(refined if passed else last_of_formula)
    return np.array(sources)


def relative_bias(
    table: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    config: ModelConfig,
    *,
    bidirectional: bool,
) -> jax.Array:
    """The bias of every head for every pair of positions, computed once per stack.

    Within self-attention, distances in a segment of a packed row equal the differences of row indices, so one row
    of positions serves the batch. Cross-attention needs the positions within the segments, row by row.

    Args:
        table: [relpos_buckets, heads].
        query_positions: int32 [1 or b, t].
        key_positions: int32 [1 or b, s].
        config: the buckets of distances.
        bidirectional: True in the encoder.

    Returns:
        [1 or b, heads, t, s].
    """
    buckets = relative_position_bucket(
        key_positions[:, None, :] - query_positions[:, :, None],
        bidirectional=bidirectional,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        boundaries=config.relative_attention_boundaries,
    )
    if len(buckets) > 1:  # row by row, a one-hot would take num_buckets / heads times the room of the bias itself
        return jnp.moveaxis(table[buckets], -1, 1)
    # A matrix product instead of a gather: its gradient is a matrix product too, not a scatter of t·s rows into 32.
    one_hot = jax.nn.one_hot(buckets, len(table), dtype=table.dtype)
    return jnp.einsum("btsr,rh->bhts", one_hot, table)


class Attention(nnx.Module):
    """Multi-head attention of one kind (`encoder.self`, `decoder.self`, `decoder.cross`) for a stack of layers."""

    def __init__(self, config: ModelConfig, kind: str, execution: Execution):
        layers, heads, qk, vo = (
            f"{kind.partition('.')[0]}.layers",
            # Where cross-attention adds the decoder's relative bias, its heads are that table's columns, too.
            "decoder.self.heads" if config.cross_attention_bias and kind == "decoder.cross" else f"{kind}.heads",
            f"{kind}.qk",
            f"{kind}.vo",
        )
        self.place = kind.partition(".")[2]
        self.drops_weights = config.inner_dropout
        self.kernel = execution.attention
        self.query = declare(config, layers, "embed", heads, qk, contracted=("embed", qk))
        self.key = declare(config, layers, "embed", heads, qk, contracted=("embed",))
        self.value = declare(config, layers, "embed", heads, vo, contracted=("embed",))
        self.out = declare(config, layers, heads, vo, "embed", contracted=(heads, vo))

    def project_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, s, embed] → keys [b, heads, d_kv, s] and values [b, heads, s, d_kv], as matrix products read them."""
        keys, values = (self._project(x, kernel[...]) for kernel in (self.key, self.value))
        return keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)

    def _project(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        projected = project("btd,dhk->bthk", x, kernel)
        return constrain(projected, "batch", "length", "heads", "qk")

    def attend(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None,
        dropout: Dropout,
    ) -> jax.Array:
        """Attend from x [b, t, embed] to projected keys and values.

        Args:
            x: normed queries' input.
            keys: [b, heads, d_kv, s].
            values: [b, heads, s, d_kv].
            mask: bool [b, t, s], True where t may look at s. A position that may look nowhere (padding) gets
                the mean of all values, finite and never read.
            bias: [1 or b, heads, t, s], or None.
            dropout: of the weights; one mask for all query positions, as in Mesh TensorFlow's T5, so that it may as
                well be one of the values, which are smaller.

        Returns:
            [b, t, embed].
        """
        query = self._project(x, self.query[...])
        if self.drops_weights:  # a key's weights for all queries are zero exactly where its value is
            values = dropout(values, f"{self.place}_weights", shared_axis=3)
        kernel = fused_attention if self.kernel == "cudnn" else plain_attention
        mixed = constrain(kernel(query, keys, values, mask, bias), "batch", "heads", "length", "vo")
        return project("bhtk,hkd->btd", mixed, self.out[...])


def declare_relative_bias(config: ModelConfig, stack: str) -> nnx.Param:
    """One table per stack, shared by its layers. Its standard deviation is T5's exception to the rule of axes."""
    axes = (f"{stack}.relpos_buckets", f"{stack}.self.heads")
    return declare(config, *axes, std=axis_size("embed", config) ** -0.5)
