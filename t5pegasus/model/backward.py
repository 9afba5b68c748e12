"""Parts of the model whose backward pass is written down here: what autodiff makes of them is slower, or keeps more.

The results are autodiff's up to rounding. Only reverse mode is there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"
"""The name of what `project` returns, for remat policies, which do not see into it."""


def project(dims: str, x: jax.Array, weights: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The product of activations with weights, `jnp.einsum(dims, x, weights)`, in the type of the activations.

    In the gradient of the weights, a product over all positions, activations are the left factor. Autodiff puts their
    gradient there, which a CPU's matrix products want transposed: XLA then computes it anew in that order, GELU's
    derivative and all. That gradient leaves the product in the weights' own type: devices and micro-batches add up
    float32, not what was rounded to bfloat16.

    Args:
        dims: such as "btd,df->btf"; every dimension of one of the three is in another, too.
        x: in the compute dtype.
        weights: in the type of the parameters.
        dtype: of the result; by default that of x.
    """
    return checkpoint_name(_product(dims, dtype or x.dtype, x, weights), PRODUCT)


def _multiply(dims: str, dtype: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, weights.astype(x.dtype), preferred_element_type=dtype)


_product = jax.custom_vjp(_multiply, nondiff_argnums=(0, 1))


def _product_forward(
    dims: str, dtype: Any, x: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(dims, dtype, x, weights), (x, weights)


def _product_backward(
    dims: str, dtype: Any, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weights = kept
    inputs, of_y = dims.split("->")
    of_x, of_weights = inputs.split(",")
    gradient = gradient.astype(x.dtype)
    return (
        jnp.einsum(f"{of_y},{of_weights}->{of_x}", gradient, weights.astype(x.dtype)),
        jnp.einsum(f"{of_x},{of_y}->{of_weights}", x, gradient, preferred_element_type=weights.dtype),
    )


_product.defvjp(_product_forward, _product_backward)


def gated_gelu(gate: jax.Array, up: jax.Array, approximate: bool) -> jax.Array:
    """gelu(gate) ⊙ up (Shazeer 2020, GEGLU), keeping its two inputs for the backward pass and nothing of GELU's own.

    Args:
        gate: [batch, length, mlp].
        up: the same shape.
        approximate: GELU by tanh, as T5 1.1 has it; else by the error function.
    """
    return _gated_gelu(gate, up, approximate)


def _activate(gate: jax.Array, up: jax.Array, approximate: bool) -> jax.Array:
    return jax.nn.gelu(gate, approximate=approximate) * up


_gated_gelu = jax.custom_vjp(_activate, nondiff_argnums=(2,))


def _gated_gelu_forward(
    gate: jax.Array, up: jax.Array, approximate: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _activate(gate, up, approximate), (gate, up)


def _gated_gelu_backward(
    approximate: bool, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(partial(_activate, approximate=approximate), *kept)
    return pull(gradient)


_gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)


@jax.custom_vjp
def add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """Attention's logits [b, heads, t, s] and a bias [1, heads, t, s] that all rows share.

    The bias's gradient is a sum over rows, taken as a product with ones: XLA's reduction over the first axis takes a
    CPU forty times as long.
    """
    return logits + bias


def _add_bias_forward(logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return add_bias(logits, bias), None


def _add_bias_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones((1, len(gradient)), gradient.dtype)
    of_bias = jnp.einsum("ab,bhts->ahts", ones, gradient, precision=jax.lax.Precision.HIGHEST)
    return gradient, of_bias


add_bias.defvjp(_add_bias_forward, _add_bias_backward)
