"""Laws of the primitives: gathers, scales, and random numbers that each index decides for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growth.expand import along, draw, gather, scale, settle

KEY = (np.uint32(0x12345678), np.uint32(0x9ABCDEF0))


def drawn(*shape: int, key=KEY) -> np.ndarray:
    return draw(key, [np.arange(size) for size in shape])


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean(left.astype(np.float64) * right))


def test_random_numbers_are_uniform_with_mean_0_and_variance_1():
    values = drawn(1000, 1000).astype(np.float64)
    assert abs(values.mean()) < 4e-3
    assert abs(values.var() - 1) < 4e-3
    assert np.abs(values).max() < 3**0.5
    assert len(np.unique(values)) > 900_000
    counts, _ = np.histogram(values, 64, (-(3**0.5), 3**0.5))
    expected = 1e6 / 64
    assert np.sum((counts - expected) ** 2 / expected) < 63 + 5 * (2 * 63) ** 0.5  # chi-squared
    bits = (np.round(values * 2**23 / 3**0.5 + 2**23 - 0.5).astype(np.int64)[..., None] >> np.arange(24)) & 1
    np.testing.assert_allclose(bits.mean((0, 1)), 0.5, atol=3e-3)


@pytest.mark.parametrize("dimension", range(3))
def test_neighbours_are_not_correlated(dimension):
    values = drawn(100, 101, 102)
    for distance in (1, 2, 64):
        left, right = (
            np.take(values, range(first, values.shape[dimension] - distance + first), dimension)
            for first in (0, distance)
        )
        assert abs(correlation(left, right)) < 5 / left.size**0.5
    cube = values[:100, :100, :100]
    off_diagonal = ~np.eye(100, dtype=bool)
    assert abs(correlation(cube[off_diagonal], np.swapaxes(cube, 0, 1)[off_diagonal])) < 5e-3


def test_neighbouring_keys_are_not_correlated():
    values = drawn(300, 300)
    for word in range(2):
        for bit in (0, 7, 31):
            other = list(KEY)
            other[word] ^= np.uint32(1 << bit)
            assert abs(correlation(values, drawn(300, 300, key=tuple(other)))) < 5 / 300
    assert abs(correlation(values, drawn(300, 300, key=KEY[::-1]))) < 5 / 300


def test_every_part_of_an_array_can_be_drawn_by_itself_on_the_host_and_on_a_device():
    values = drawn(7, 50, 33)
    positions = [np.array([6, 0, 3]), np.arange(11, 29), np.array([32, 32, 1])]
    part = draw(KEY, positions)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, values[np.ix_(*positions)])
    on_device = jax.jit(draw)(tuple(map(jnp.asarray, KEY)), [jnp.asarray(each) for each in positions])
    np.testing.assert_array_equal(on_device, part)


def test_gather_and_scale_work_along_each_dimension_and_leave_the_given_array_alone():
    array = np.random.default_rng(0).standard_normal((4, 5, 6))
    before = array.copy()
    rows, columns = np.array([3, 3, 0]), np.array([1, 5])
    for given in (array, jnp.asarray(array)):
        np.testing.assert_array_equal(gather(given, (rows, None, columns)), np.asarray(given)[rows][:, :, columns])
    factors = np.arange(1.0, 6.0)
    np.testing.assert_array_equal(scale(array.copy(), (None, factors, None)), before * factors[None, :, None])
    assert along(factors, 1, 3).shape == (1, 5, 1)
    np.testing.assert_array_equal(array, before)


def test_what_is_settled_is_rounded_by_compilers_as_by_numpy():
    random = np.random.default_rng(0)
    one, two, three = (random.standard_normal((64, 65)).astype(np.float32) for _ in range(3))

    def combine(one, two, three, zero):
        return settle(one * two, zero) + three

    wanted = one * two + three
    got = jax.jit(combine)(one, two, three, jnp.uint32(0))
    np.testing.assert_array_equal(got, wanted)
