"""Laws of `num_masked_tokens`: masked tokens have probability 0 everywhere, and all else is as without them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_t5 import forward

from t5pegasus.batch import Batch
from t5pegasus.config import NUMERICS, ModelConfig, RunConfig, TrainConfig
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.errors import UsageError
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.model.t5 import bind, init_parameters
from t5pegasus.train.loss import smooth_labels, sum_losses
from t5pegasus.train.noise import disturb_decoder_inputs

NUM_OPEN, NUM_MASKED = 41, 6
SMALL = ModelConfig(
    vocab_size=NUM_OPEN, d_model=16, d_kv=6, d_ff=24, num_heads=3, num_encoder_layers=1, num_decoder_layers=1,
    dropout_rate=0.0, decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip


def widen(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, vocab_size=NUM_OPEN + NUM_MASKED, num_masked_tokens=NUM_MASKED)


def widen_parameters(parameters):
    """With rows for the masked tokens that would be likely, were they open."""
    random = np.random.default_rng(2)
    wide = dict(parameters)
    for name, axis in (("token_embedding", 0), ("lm_head", 1)):
        if name in parameters:
            shape = list(parameters[name].shape)
            shape[axis] = NUM_MASKED
            rows = jnp.asarray(10 * random.normal(size=shape), jnp.float32)
            wide[name] = jnp.concatenate([parameters[name], rows], axis=axis)
    return wide


@pytest.fixture(scope="module", params=NUMERICS)
def config(request) -> ModelConfig:
    return dataclasses.replace(SMALL, **NUMERICS[request.param])


@pytest.fixture(scope="module")
def parameters(config):
    return init_parameters(config, 4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    random = np.random.default_rng(0)
    source, target = random.integers(3, NUM_OPEN, (3, 9)), random.integers(3, NUM_OPEN, (3, 7))
    fields = (
        source, np.ones_like(source), np.tile(np.arange(9), (3, 1)),
        np.concatenate([np.ones((3, 1), int), target[:, :-1]], axis=1), target, np.ones(target.shape, np.float32),
        np.ones_like(target), np.tile(np.arange(7), (3, 1)), np.arange(3, dtype=np.uint32),
    )  # fmt: skip
    return Batch(*(jnp.asarray(field if field.dtype in ("f", "I") else field.astype(np.int32)) for field in fields))


@functools.partial(jax.jit, static_argnums=(0, 3))
def compute_logits(config, parameters, batch, dtype=jnp.float32):
    return bind(config, parameters, dtype)(batch)


def test_open_logits_stay_and_masked_probabilities_are_exactly_zero(config, parameters, batch):
    wide, wide_parameters = widen(config), widen_parameters(parameters)
    logits = compute_logits(wide, wide_parameters, batch)
    wanted = compute_logits(config, parameters, batch)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[..., :NUM_OPEN], wanted, rtol=0, atol=2e-6)
    for dtype in (jnp.float32, jnp.bfloat16):
        probabilities = jax.nn.softmax(compute_logits(wide, wide_parameters, batch, dtype))
        assert (probabilities[..., NUM_OPEN:] == 0).all()
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    opened = compute_logits(dataclasses.replace(wide, num_masked_tokens=0), wide_parameters, batch)
    assert jax.nn.softmax(opened)[..., NUM_OPEN:].max() > 0.5  # they would have been likely


def test_the_independent_forward_masks_the_same(config, parameters, batch):
    wide, wide_parameters = widen(config), widen_parameters(parameters)
    source, target = np.asarray(batch.encoder_input_tokens[0]), np.asarray(batch.decoder_input_tokens[0])
    theirs = forward(parameters_to_hf(wide_parameters, wide), wide, source, np.ones(9, bool), target)
    ours = np.asarray(compute_logits(wide, wide_parameters, batch)[0])
    np.testing.assert_allclose(ours[:, :NUM_OPEN], theirs[:, :NUM_OPEN], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(ours[:, NUM_OPEN:] < -1e30, np.isneginf(theirs[:, NUM_OPEN:]))


@functools.partial(jax.jit, static_argnums=0)
def compute_losses(config, parameters, batch):
    """All sums of the loss, and the gradient of what training minimises with smoothing and z-loss."""

    def objective(parameters):
        sums = sum_losses(
            bind(config, parameters)(batch), batch.decoder_target_tokens, batch.decoder_loss_weights,
            with_uniform=True, num_masked_tokens=config.num_masked_tokens,
        )  # fmt: skip
        return smooth_labels(sums, 0.2) + 0.01 * sums.z, sums

    return jax.grad(objective, has_aux=True)(parameters)


def test_losses_and_gradients_are_those_without_the_masked_tokens(config, parameters, batch):
    gradients, sums = compute_losses(widen(config), widen_parameters(parameters), batch)
    wanted_gradients, wanted = compute_losses(config, parameters, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), sums, wanted)
    assert (gradients["token_embedding"][NUM_OPEN:] == 0).all()
    assert "lm_head" not in gradients or (gradients["lm_head"][:, NUM_OPEN:] == 0).all()
    for name, wanted_gradient in wanted_gradients.items():
        among_open = gradients[name][tuple(map(slice, wanted_gradient.shape))]
        largest = np.abs(wanted_gradient).max()
        np.testing.assert_allclose(among_open, wanted_gradient, rtol=0, atol=1e-5 * largest, err_msg=name)


def test_the_loss_of_a_masked_target_is_nothing_that_training_goes_on_with(batch):
    masked = batch._replace(decoder_target_tokens=batch.decoder_target_tokens.at[0, 0].set(NUM_OPEN))
    _, sums = compute_losses(widen(SMALL), widen_parameters(init_parameters(SMALL, 4)), masked)
    assert not sums.nll < 1e30


def test_noise_draws_the_tokens_it_would_draw_without_the_masked_ones(batch):
    train = TrainConfig(decoder_noise_rate=0.9)
    many = jax.tree.map(lambda field: jnp.tile(field, (40, *(1,) * (field.ndim - 1))), batch)
    many = many._replace(row_ids=jnp.arange(120, dtype=jnp.uint32))
    disturbed = [
        disturb_decoder_inputs(many, RunConfig(model=model, train=train)).decoder_input_tokens
        for model in (SMALL, widen(SMALL))
    ]
    np.testing.assert_array_equal(*disturbed)
    assert set(np.unique(disturbed[1])) == set(range(NUM_OPEN)) - {0, 2}


SEARCHES = {
    "greedy": GenerationOptions(max_new_tokens=8),
    "sampling": GenerationOptions(max_new_tokens=8, temperature=1.5, num_return=3, seed=7),
    "nucleus": GenerationOptions(max_new_tokens=8, temperature=2.0, top_k=40, top_p=0.95, seed=7),
    "beams": GenerationOptions(max_new_tokens=8, num_beams=4, no_repeat_ngram_size=2, length_penalty=0.6),
    "bert4keras": GenerationOptions(max_new_tokens=8, num_beams=3, finalisation="bert4keras", min_new_tokens=3),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_writes_what_it_would_write_without_the_masked_tokens(batch, name):
    parameters = init_parameters(SMALL, 4)
    parameters |= {"lm_head": 3 * parameters["lm_head"]}
    rows = batch.encoder_input_tokens, batch.encoder_segment_ids, batch.row_ids
    wanted = generate(SMALL, parameters, *rows, SEARCHES[name])
    got = generate(widen(SMALL), widen_parameters(parameters), *rows, SEARCHES[name])
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.lengths, wanted.lengths)
    np.testing.assert_allclose(got.scores, wanted.scores, rtol=2e-6)


@pytest.mark.parametrize("name", ["greedy", "sampling", "beams", "bert4keras"])
def test_a_masked_token_is_not_written_even_where_nothing_else_is_left(batch, name):
    """Four open tokens, each of them once: after that there is no continuation at all."""
    model = dataclasses.replace(SMALL, vocab_size=10, num_masked_tokens=6)
    options = dataclasses.replace(SEARCHES[name], no_repeat_ngram_size=1, min_new_tokens=8)
    rows = batch.encoder_input_tokens % 4, batch.encoder_segment_ids, batch.row_ids
    written = generate(model, init_parameters(model, 1), *rows, options)
    assert (written.tokens < 4).all()
    assert not np.isfinite(written.scores).any()


def test_special_tokens_must_be_open():
    with pytest.raises(UsageError, match=r"num_masked_tokens=50000 must lie in \[0, vocab_size=50000\)"):
        ModelConfig(num_masked_tokens=50_000)
    with pytest.raises(UsageError, match=r"eos_token_id=102 must lie in \[0, 102, the open part of vocab_size=50000\)"):
        ModelConfig(num_masked_tokens=49_898)
    assert widen(SMALL).num_open_tokens == NUM_OPEN
