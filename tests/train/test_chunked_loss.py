"""The loss by chunks of the vocabulary is the loss of whole logits, and so are its gradients, on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.config import MeshConfig
from t5pegasus.sharding import make_mesh
from t5pegasus.train.chunked_loss import ChunkedHead, sum_chunked_losses
from t5pegasus.train.head_loss import choose_chunk
from t5pegasus.train.loss import smooth_labels, sum_losses

ROWS, LENGTH, EMBED, VOCABULARY = 4, 6, 8, 56


@pytest.fixture(scope="module")
def drawn():
    """States, head, targets and weights; some targets weigh nothing, some logits are large."""
    random = np.random.default_rng(0)
    states, head = random.normal(size=(ROWS, LENGTH, EMBED)), 3 * random.normal(size=(EMBED, VOCABULARY))
    targets = random.integers(0, VOCABULARY - 6, (ROWS, LENGTH), np.int32)
    best = np.argmax(states @ head[:, : VOCABULARY - 6], axis=-1)
    targets = np.where(random.random(targets.shape) < 0.5, best, targets).astype(np.int32)
    return states, head, targets, (random.random(targets.shape) < 0.8).astype(np.float64)


def whole(states, head, targets, weights, num_open: int):
    logits = jnp.einsum("btd,dv->btv", states, head)
    logits = jnp.where(jnp.arange(VOCABULARY)[None, None] < num_open, logits, jnp.finfo(logits.dtype).min / 2)
    return sum_losses(logits, targets, weights, with_uniform=True, num_masked_tokens=VOCABULARY - num_open)


def chunked(states, head, targets, weights, num_open: int, chunk_size: int):
    return sum_chunked_losses(states, head, targets, weights, ChunkedHead(num_open, chunk_size, with_uniform=True))


def value_and_gradients(compute, dtype, drawn):
    """All five sums, and the gradients of a training loss with smoothing and z-loss."""
    states, head, targets, weights = drawn

    def objective(states, head):
        sums = compute(states, head, jnp.asarray(targets), jnp.asarray(weights, dtype))
        return smooth_labels(sums, 0.2) + 0.05 * sums.z, sums

    run = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    return jax.tree.leaves(run(jnp.asarray(states, dtype), jnp.asarray(head, dtype)))


@pytest.mark.parametrize(
    ("num_open", "chunk_size"), [(VOCABULARY, 24), (VOCABULARY - 6, 24), (VOCABULARY - 6, 1), (VOCABULARY, VOCABULARY)]
)
def test_chunks_give_the_sums_and_gradients_of_whole_logits(drawn, num_open, chunk_size):
    for dtype, tolerance in ((jnp.float64, 1e-13), (jnp.float32, 1e-6)):
        with jax.enable_x64(dtype == jnp.float64):
            wanted = value_and_gradients(functools.partial(whole, num_open=num_open), dtype, drawn)
            compute = functools.partial(chunked, num_open=num_open, chunk_size=chunk_size)
            got = value_and_gradients(compute, dtype, drawn)
        for one, other in zip(got, wanted):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 4, 1), (2, 2, 2)])
def test_chunks_of_each_devices_part_of_the_vocabulary_give_the_same(drawn, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    num_open = VOCABULARY - 6
    with jax.enable_x64(True):
        wanted = value_and_gradients(functools.partial(whole, num_open=num_open), jnp.float64, drawn)
        with jax.set_mesh(mesh):
            compute = functools.partial(chunked, num_open=num_open, chunk_size=12)
            got = value_and_gradients(compute, jnp.float64, drawn)
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13 * np.abs(other).max())


def test_the_first_of_equal_logits_is_the_most_likely_one(drawn):
    states, head, _, weights = (np.round(2 * each) for each in drawn)  # whole numbers: no rounding decides
    twice = np.concatenate([head[:, :28], head[:, :28]], axis=1)
    targets = np.argmax(states @ twice, axis=-1).astype(np.int32)
    for chunk_size in (8, 28, 40):
        sums = chunked(*map(jnp.asarray, (states, twice, targets, weights)), VOCABULARY, chunk_size)
        assert float(sums.correct) == weights.sum() > 0


def test_no_program_holds_whole_logits(drawn):
    states, head, targets, weights = (jnp.asarray(each) for each in drawn)
    compute = functools.partial(chunked, num_open=VOCABULARY, chunk_size=12)
    gradient = jax.grad(lambda *parts: compute(*parts, targets, weights).nll, argnums=(0, 1))
    text = jax.jit(gradient).lower(states, head).as_text()
    assert f"{ROWS}x{LENGTH}x12x" in text
    assert f"{ROWS}x{LENGTH}x{VOCABULARY}x" not in text


def test_logits_are_whole_where_they_are_few_and_in_even_chunks_elsewhere(run_config):
    model = dataclasses.replace(run_config.model, vocab_size=50_000)
    config = dataclasses.replace(run_config, model=model)
    assert choose_chunk(config, (8, 64), 4) is None  # 98 MiB
    assert choose_chunk(config, (64, 114), 4) == 2304  # 29 KB for each entry
    asked = dataclasses.replace(config, train=dataclasses.replace(config.train, vocab_chunk=700))
    assert choose_chunk(asked, (8, 64), 4) == 700
    asked = dataclasses.replace(config, train=dataclasses.replace(config.train, vocab_chunk=50_000))
    assert choose_chunk(asked, (64, 1024), 4) is None
    with jax.set_mesh(make_mesh(MeshConfig(1, 4, 2))):
        assert choose_chunk(config, (8, 64), 4) == 6272  # a quarter of what a device has: its head must be gathered
