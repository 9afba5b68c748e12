"""Laws of the training target: label smoothing and decoder-input noise are their formulas, and nothing when off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.train.chunked_loss import ChunkedHead, sum_chunked_losses
from t5pegasus.train.loss import first_highest, smooth_labels, split_by_source, sum_losses
from t5pegasus.train.noise import disturb_decoder_inputs

VOCABULARY = 128


@pytest.fixture(scope="module")
def scored():
    """Logits, targets and weights of 2 × 5 positions, the last of them padding."""
    random = np.random.default_rng(0)
    logits = 3 * random.normal(size=(2, 5, 7)).astype(np.float32)
    weights = np.ones((2, 5), np.float32)
    weights[:, -1] = 0
    return logits, random.integers(0, 7, (2, 5), np.int32), weights


def test_label_smoothing_is_cross_entropy_against_the_smoothed_target(scored):
    logits, targets, weights = scored
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for epsilon in (0.1, 0.4):
        wanted = np.full(logits.shape, epsilon / 7) + (1 - epsilon) * np.eye(7)[targets]
        sums = sum_losses(*map(jnp.asarray, scored), with_uniform=True)
        smoothed = -np.sum(weights[..., None] * wanted * log_p)
        np.testing.assert_allclose(smooth_labels(sums, epsilon), smoothed, rtol=1e-6)


def test_smoothing_leaves_the_reported_sums_alone_and_none_is_plain(scored):
    plain, smoothed = (sum_losses(*map(jnp.asarray, scored), with_uniform=each) for each in (False, True))
    assert plain.uniform is None
    assert plain[:4] == smoothed[:4]
    assert smooth_labels(plain, 0.0) is plain.nll
    assert smooth_labels(smoothed, 0.0) == plain.nll


@pytest.fixture(scope="module")
def packed() -> Batch:
    """Rows of 40 target positions: examples of 20, 2 and 12 tokens, each ending with the end id 102, then padding."""
    random = np.random.default_rng(1)
    num_rows, lengths = 64, (20, 2, 12)
    targets = random.integers(3, 101, (num_rows, 40), np.int32)
    segments = np.repeat([1, 2, 3, 0], (*lengths, 6)).astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in (*lengths, 6)]).astype(np.int32)
    positions[segments == 0] = 0
    targets[:, np.cumsum(lengths) - 1] = 102
    inputs = np.where(positions == 0, 101, np.roll(targets, 1, axis=1)).astype(np.int32)
    inputs[:, segments == 0] = 0
    everywhere = [np.tile(each, (num_rows, 1)) for each in (segments, positions)]
    nothing = np.zeros((num_rows, 1), np.int32)
    return Batch(
        *(nothing,) * 3, inputs, targets, (everywhere[0] > 0).astype(np.float32), *everywhere,
        row_ids=np.arange(num_rows, dtype=np.uint32),
    )  # fmt: skip


def with_noise(run_config, **fields):
    return dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, **fields))


@pytest.fixture(scope="module")
def disturb(packed, run_config):
    """Inputs under these settings, and where they are others."""

    def inputs(batch=packed, **fields):
        given = jnp.asarray(batch.decoder_input_tokens)
        batch = jax.tree.map(jnp.asarray, batch)
        out = disturb_decoder_inputs(batch, with_noise(run_config, **fields))
        assert all(a is b for name, a, b in zip(Batch._fields, batch, out) if name != "decoder_input_tokens")
        return np.asarray(out.decoder_input_tokens), np.asarray(out.decoder_input_tokens != given)

    return inputs


@pytest.mark.parametrize("source", ["vocabulary", "target"])
def test_noise_spares_starts_and_padding_and_has_its_rate(packed, disturb, source):
    inputs, changed = disturb(decoder_noise_rate=0.3, decoder_noise_source=source)
    free = (packed.decoder_segment_ids > 0) & (packed.decoder_positions > 0)
    assert not changed[~free].any()
    assert not np.isin(inputs[changed], [0, 101, 102]).any()
    long = free & (packed.decoder_segment_ids == 1)  # 64 × 19 draws, of which an 18th or less give the same token
    assert 0.3 * 0.9 - 0.045 < changed[long].mean() < 0.3 + 0.045


def test_noise_from_the_target_stays_within_its_example(packed, disturb):
    inputs, changed = disturb(decoder_noise_rate=0.5, decoder_noise_source="target")
    for row, place in np.argwhere(changed):
        own = packed.decoder_segment_ids[row] == packed.decoder_segment_ids[row, place]
        assert inputs[row, place] in packed.decoder_target_tokens[row, own]
    assert not changed[packed.decoder_segment_ids == 2].any()  # of one token there is no other


def test_noise_from_the_vocabulary_reaches_all_of_it_evenly(disturb):
    inputs, changed = disturb(decoder_noise_rate=0.9)
    counts = np.bincount(inputs[changed], minlength=VOCABULARY)
    allowed = np.setdiff1d(np.arange(VOCABULARY), [0, 101, 102])
    assert counts.sum() == counts[allowed].sum() > 1500
    assert (counts[allowed] > 0).mean() > 0.99
    assert counts.max() < 40


def test_a_share_of_the_examples_is_disturbed_as_a_whole(packed, disturb):
    _, changed = disturb(decoder_noise_rate=0.9, decoder_noise_examples=0.5)
    touched = changed[:, :20].sum(axis=1)
    assert set(touched > 0) == {True, False}
    assert 0.3 < np.mean(touched > 0) < 0.7
    assert touched[touched > 0].min() > 10


def test_a_row_draws_the_same_noise_in_every_batch_and_another_under_another_seed(packed, disturb):
    inputs, _ = disturb(decoder_noise_rate=0.3)
    some = np.array([40, 3, 17])
    part, _ = disturb(jax.tree.map(lambda field: field[some], packed), decoder_noise_rate=0.3)
    np.testing.assert_array_equal(part, inputs[some])
    assert (disturb(decoder_noise_rate=0.3, seed=1)[0] != inputs).any()


def test_noise_that_is_off_returns_the_very_batch(packed, run_config):
    assert disturb_decoder_inputs(packed, run_config) is packed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 1.0}, r"train.label_smoothing=1.0 must lie in \[0, 1\)"),
        ({"decoder_noise_rate": -0.1}, r"train.decoder_noise_rate=-0.1 must lie in \[0, 1\)"),
        ({"decoder_noise_examples": 0.0}, r"train.decoder_noise_examples=0.0 .* set decoder_noise_rate=0"),
        ({"decoder_noise_source": "source"}, "train.decoder_noise_source='source' must be vocabulary or target"),
    ],
)
def test_settings_outside_their_range_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**fields)


def test_the_first_of_equal_logits_is_the_one_that_counts():
    logits = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.float32)
    np.testing.assert_array_equal(first_highest(logits), np.argmax(logits, axis=-1))


def test_losses_by_source_add_up_and_are_alike_by_chunks():
    rng = np.random.default_rng(3)
    states, head = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 5, 8), (8, 40)))
    targets = jnp.asarray(rng.integers(0, 40, (6, 5)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (6, 5)), jnp.float32)
    sources = jnp.array([0, 2, 2, 0, 2, 0])
    whole = sum_losses(states @ head, targets, weights)
    chunked = sum_chunked_losses(states, head, targets, weights, ChunkedHead(40, 16, with_uniform=False))
    assert split_by_source(whole, weights, sources, 1).by_source is None
    program = jax.make_jaxpr(lambda sums: split_by_source(sums, weights, sources, 3))(whole)
    assert "dot_general" not in str(program)  # a TPU would round its operands
    split = [split_by_source(sums, weights, sources, 3) for sums in (whole, chunked)]
    np.testing.assert_allclose(split[0].by_source, split[1].by_source, rtol=1e-5)
    nll, weight = np.asarray(split[0].by_source)
    assert weight.tolist() == [float(weights[np.array(rows, int)].sum()) for rows in ([0, 3, 5], [], [1, 2, 4])]
    assert nll[1] == 0
    np.testing.assert_allclose(nll.sum(), whole.nll, rtol=1e-6)
    of_first = sum_losses((states @ head)[sources == 0], targets[sources == 0], weights[sources == 0])
    np.testing.assert_allclose(nll[0], of_first.nll, rtol=1e-6)
