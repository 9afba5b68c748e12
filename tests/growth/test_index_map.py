import numpy as np
import pytest

from growth.index_map import map_axes, map_axis
from t5pegasus.config import ModelConfig


@pytest.mark.parametrize(("source_size", "target_size"), [(64, 97), (1, 2), (768, 1024), (7, 28)])
def test_the_stream_map_is_a_scaled_isometry_that_keeps_the_mean_square(source_size, target_size):
    stream = map_axis("embed", source_size, target_size)
    matrix = np.zeros((target_size, source_size))
    kept = ~stream.created
    matrix[np.flatnonzero(kept), stream.sources[kept]] = stream.written[kept]
    np.testing.assert_allclose(matrix.T @ matrix, target_size / source_size * np.eye(source_size), rtol=1e-15)
    np.testing.assert_allclose(stream.written[kept] * stream.read[kept], 1.0, rtol=1e-15)
    assert np.all(stream.sources[stream.created] == -1)
    assert np.all(stream.read[stream.created] == 0)


@pytest.mark.parametrize(("source_size", "target_size"), [(1, 4), (2, 3), (8, 12), (12, 24), (5, 17)])
def test_new_layers_are_spread_evenly_behind_the_ones_they_copy(source_size, target_size):
    layers = map_axis("encoder.layers", source_size, target_size)
    np.testing.assert_array_equal(layers.sources[~layers.created], np.arange(source_size))
    assert np.all(np.diff(layers.sources) >= 0)
    copies = np.bincount(layers.sources)
    assert copies.max() - copies.min() <= 1
    for index in np.flatnonzero(layers.created):
        assert layers.sources[index] == layers.sources[index - 1]


def test_only_axes_whose_size_differs_have_a_map():
    axes = ("embed", "vocab", "encoder.mlp", "decoder.cross.heads", "decoder.cross.vo", "encoder.layers")
    maps = map_axes(axes, ModelConfig(num_heads=6), ModelConfig(num_heads=8))
    assert maps.keys() == {"decoder.cross.heads"}


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="vocab"):
        map_axis("vocab", 10, 11)
    with pytest.raises(ValueError, match="not more"):
        map_axis("embed", 8, 8)
