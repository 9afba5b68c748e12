"""Gradients that are written down are autodiff's, and keep no more than they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.model.backward import add_bias, gated_gelu, project

DIMENSIONS = {"b": 3, "t": 5, "d": 4, "f": 7, "h": 2, "k": 6}


def draw(seed, dims, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), [DIMENSIONS[dim] for dim in dims], dtype)


def assert_same_gradients(ours, autodiff, *arrays):
    """Both functions' results, and their gradients of a sum in which every entry weighs otherwise."""
    result = autodiff(*arrays)
    np.testing.assert_allclose(ours(*arrays), result, rtol=1e-14, atol=0)
    weights = jax.random.normal(jax.random.key(9), result.shape, result.dtype)
    got, wanted = (
        jax.grad(lambda *arrays, f=f: jnp.sum(weights * f(*arrays)), argnums=tuple(range(len(arrays))))(*arrays)
        for f in (ours, autodiff)
    )
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dims", ["btd,df->btf", "btf,fd->btd", "btd,dhk->bthk", "bhtk,hkd->btd"])
def test_project_is_the_einsum_in_both_directions(dims):
    of_x, of_weights = dims.split("->")[0].split(",")
    with jax.enable_x64(True):
        assert_same_gradients(
            lambda x, w: project(dims, x, w), lambda x, w: jnp.einsum(dims, x, w), draw(0, of_x), draw(1, of_weights)
        )


def test_weights_get_the_gradient_of_their_own_type_that_was_never_rounded():
    x, weights = draw(0, "btd", jnp.bfloat16), draw(1, "df", jnp.float32)
    y, pull = jax.vjp(lambda x, weights: project("btd,df->btf", x, weights), x, weights)
    gradient = draw(2, "btf", jnp.bfloat16)
    of_x, of_weights = pull(gradient)
    assert (y.dtype, of_x.dtype, of_weights.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("btd,btf->df", *(np.asarray(each, np.float64) for each in (x, gradient)))
    np.testing.assert_allclose(of_weights, exact, rtol=1e-5, atol=1e-6)
    assert project("btd,df->btf", x, weights, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("approximate", [True, False])
def test_gated_gelu_has_autodiffs_gradients_and_keeps_its_two_inputs(approximate):
    with jax.enable_x64(True):
        assert_same_gradients(
            lambda gate, up: gated_gelu(gate, up, approximate),
            lambda gate, up: jax.nn.gelu(gate, approximate=approximate) * up,
            draw(0, "btf"),
            draw(1, "btf"),
        )
    gate, up = (draw(seed, "btf", jnp.float32) for seed in (0, 1))
    _, pull = jax.vjp(lambda gate, up: gated_gelu(gate, up, approximate), gate, up)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.size > 1) == gate.size + up.size


def test_the_gradient_of_a_shared_bias_is_the_sum_over_rows():
    with jax.enable_x64(True):
        logits, bias = draw(0, "bhtt"), draw(1, "htt")[None]
        assert_same_gradients(
            add_bias, lambda logits, bias: logits + jnp.broadcast_to(bias, logits.shape), logits, bias
        )
