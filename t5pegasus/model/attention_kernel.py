"""Kernels of attention with a learned bias: XLA's products and softmax, or cuDNN's fused one on NVIDIA GPUs."""

from typing import Literal

import jax
import jax.numpy as jnp

from t5pegasus.model.backward import add_bias
from t5pegasus.sharding import constrain

CUDNN_HEAD_SIZES = range(8, 129, 8)
"""What cuDNN takes on every GPU that it supports; newer ones take more."""


def plain_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Softmax of the biased products, float32 at least, times the values.

    Args:
        query: [b, t, heads, qk].
        keys: [b, heads, qk, s].
        values: [b, heads, s, vo].
        mask: bool [b, t, s], True where t may look at s. A position that may look nowhere (padding) gets the mean
            of all values, finite and never read.
        bias: [1 or b, heads, t, s], or None.

    Returns:
        [b, heads, t, vo].
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bthk,bhks->bhts", query, keys, preferred_element_type=wide)
    if bias is not None:
        bias = bias.astype(wide)
        logits = add_bias(logits, bias) if len(bias) < len(logits) else logits + bias
    logits = jnp.where(mask[:, None], logits, jnp.finfo(wide).min / 2)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights, values)


def fused_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """The same by `jax.nn.dot_product_attention`; arguments and result as of `plain_attention`.

    cuDNN takes no mask beside a bias, so both are one tensor [b, heads, t, s] in the compute dtype, which does not
    depend on the layer: it is there once, not per layer as the weights of the plain kernel are. Its gradient is summed
    over rows in float32.
    """
    num_rows, num_targets, num_heads, _ = query.shape
    shape = (num_rows, num_heads, num_targets, keys.shape[3])
    # Not the least number of the type: the kernel subtracts such numbers from one another.
    lowest = jnp.asarray(-(2.0**41) if query.dtype == jnp.bfloat16 else -(2.0**15), jnp.float32)
    added = jnp.zeros((), jnp.float32) if bias is None else jnp.broadcast_to(bias.astype(jnp.float32), shape)
    added = jnp.where(jnp.broadcast_to(mask[:, None], shape), added, lowest).astype(query.dtype)
    keys, values = (
        constrain(part, "batch", "length", "heads", "qk")
        for part in (keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3))
    )
    added = constrain(added, "batch", "heads", "length", "length")
    mixed = jax.nn.dot_product_attention(query, keys, values, bias=added, scale=1.0, implementation=implementation)
    return mixed.transpose(0, 2, 1, 3)


def cudnn_obstacle(backend: str, dtype: jax.typing.DTypeLike, head_size: int, lengths: tuple[int, ...]) -> str | None:
    """Why cuDNN's attention cannot be used, as the end of a sentence; None where it can.

    Args:
        backend: JAX's name of it.
        dtype: of activations.
        head_size: d_kv.
        lengths: of the rows of both stacks.
    """
    if backend != "gpu":
        return f"it needs a CUDA GPU, the backend is {backend}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16, train.compute_dtype is {jnp.dtype(dtype)}"
    if head_size not in CUDNN_HEAD_SIZES:
        return f"it needs a model.d_kv that is a multiple of 8 up to 128, got {head_size}"
    if odd := [length for length in lengths if length % 2]:
        return f"it needs rows of even length, got {odd[0]}"
    return None
