"""Dropout masks: their rate, and that entries have nothing to do with one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.model.layers import Dropout

ROWS, LENGTH, WIDTH = 4, 64, 512


def kept(rate, length=LENGTH, place="mlp", **options):
    """Bool [rows, length, width]: which entries of ones are left."""
    dropped = Dropout.of_rows(rate, 3, jnp.arange(ROWS, dtype=jnp.uint32))(
        jnp.ones((ROWS, length, WIDTH)), place, **options
    )
    return np.asarray(dropped) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_share_of_the_entries_is_dropped_and_the_mean_stays(rate):
    mask = kept(rate)
    # Five standard deviations of the mean of so many independent entries.
    assert abs(mask.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / mask.size)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1)])
def test_neighbours_are_dropped_independently(shift):
    """Rows, the two halves of one random number, those of the next, and entries side by side."""
    mask = kept(0.3).astype(float) - 0.7
    other = np.roll(mask, shift, axis=(0, 1, 2))
    assert abs(np.mean(mask * other)) < 5 * 0.3 * 0.7 / np.sqrt(mask.size)


def test_places_have_masks_of_their_own():
    one, other = (kept(0.3, place=place).astype(float) - 0.7 for place in ("mlp", "mlp_output"))
    assert abs(np.mean(one * other)) < 5 * 0.3 * 0.7 / np.sqrt(one.size)


def test_an_odd_length_and_a_shared_axis():
    mask = kept(0.3, length=7, shared_axis=2)
    assert mask.shape == (ROWS, 7, WIDTH)
    assert (mask == mask[..., :1]).all()
    assert 0 < mask[..., 0].mean() < 1


def test_a_rate_of_all_but_nothing_drops_little():
    assert kept(1e-4).mean() > 0.999
    assert jax.numpy.isfinite(
        Dropout.of_rows(1e-9, 0, jnp.arange(1, dtype=jnp.uint32))(jnp.ones((1, 2, 2)), "mlp")
    ).all()
