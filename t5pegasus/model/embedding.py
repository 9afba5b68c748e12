"""Looking up tokens in a table that is split by rows and by columns, without ever gathering it."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5pegasus.sharding import RULES, partition_spec


def look_up(table: jax.Array, tokens: jax.Array, dtype: jax.typing.DTypeLike, *, split_length: bool) -> jax.Array:
    """Rows of a table [vocab, embed] for tokens int32 [b, t] → [b, t, embed] in a dtype.

    On a mesh every device looks the tokens of its `fsdp` group up in its own part: rows it lacks give zeros, which a
    sum over `tensor` fills, and its columns go to the devices whose tokens they are. What moves is as large as the
    result. The gradient takes the same way back, and adds up, in the table's own dtype, within each part.

    Args:
        table: the parameter, as it is kept.
        tokens: what to look up; rows are split as `batch` is.
        dtype: of the result; what was found is cast, not the table.
        split_length: whether the result is split by length over `tensor`; the length must divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_columns, by_rows = str(RULES["embed"]), str(RULES["vocab"])
    if mesh.empty or mesh.shape[by_columns] * mesh.shape[by_rows] == 1:
        return table[tokens].astype(dtype)

    def look_up_part(table: jax.Array, tokens: jax.Array) -> jax.Array:
        tokens = jax.lax.all_gather(tokens, by_columns, axis=0, tiled=True)
        own = tokens - jax.lax.axis_index(by_rows) * len(table)
        is_own = (own >= 0) & (own < len(table))
        found = jnp.where(is_own[..., None], table[jnp.where(is_own, own, 0)], 0).astype(dtype)
        if split_length:
            found = jax.lax.psum_scatter(found, by_rows, scatter_dimension=1, tiled=True)
        else:
            found = jax.lax.psum(found, by_rows)
        return jax.lax.all_to_all(found, by_columns, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(
        look_up_part,
        in_specs=(partition_spec("vocab", "embed"), PartitionSpec(RULES["batch"], None)),
        out_specs=PartitionSpec(RULES["batch"], by_rows if split_length else None, None),
    )(table, tokens)
