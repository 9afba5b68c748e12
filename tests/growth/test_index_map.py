"""Laws of the maps: isometries of the stream, shares of units, places of layers, rows of tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growth.index_map import (
    IndexMap,
    add_rows,
    duplicate_stream,
    duplicate_units,
    insert_layers,
    pad_stream,
    pad_units,
    select_rows,
    spread,
    stack_layers,
)

SIZES = st.tuples(st.integers(1, 40), st.floats(1.0, 5.0)).map(lambda pair: (pair[0], 1 + int(pair[0] * pair[1])))
SHARES = st.one_of(st.none(), st.floats(0.01, 0.99))


@st.composite
def stream_maps(draw) -> IndexMap:
    sizes, scaled = draw(SIZES), draw(st.booleans())
    if draw(st.booleans()):
        return duplicate_stream(*sizes, draw(SHARES), scale_gains=scaled)
    return pad_stream(*sizes, tail=draw(st.booleans()), scale_gains=scaled)


@st.composite
def unit_maps(draw) -> IndexMap:
    sizes = draw(SIZES)
    return duplicate_units(*sizes, draw(SHARES)) if draw(st.booleans()) else pad_units(*sizes, tail=draw(st.booleans()))


def matrix(entry: IndexMap, values: np.ndarray) -> np.ndarray:
    """[grown, source]: what a map does to a vector along the axis."""
    dense, kept = np.zeros((entry.size, entry.source_size)), np.flatnonzero(~entry.created)
    dense[kept, entry.sources[kept]] = values[kept]
    return dense


def check_invariants(entry: IndexMap) -> None:
    assert entry.sources.dtype == np.int32
    assert np.all((entry.sources >= 0) & (entry.sources < entry.source_size))
    assert np.all(entry.written[entry.created] == 1)
    assert np.all(entry.read[entry.created] == 1)
    assert np.all(entry.copies >= 1)
    assert not np.any(entry.created & entry.copied)
    assert np.count_nonzero(~entry.created & ~entry.copied) == entry.source_size


@given(stream_maps())
def test_the_stream_is_a_scaled_isometry_whose_readers_are_its_left_inverse(entry):
    check_invariants(entry)
    P, read = matrix(entry, entry.written), matrix(entry, entry.read)
    identity = np.eye(entry.source_size)
    c = entry.written[~entry.created][0] / entry.read[~entry.created][0]
    assert c == pytest.approx(entry.ratio, rel=1e-14) or c == pytest.approx(1.0, rel=1e-14)
    np.testing.assert_allclose(P.T @ P, c * identity, atol=1e-13 * c)
    np.testing.assert_allclose(read.T @ P, identity, atol=1e-14)
    np.testing.assert_allclose(read, P / c, atol=1e-15)  # or gradients would bend


@given(unit_maps())
def test_units_are_written_as_they_were_and_read_in_shares(entry):
    check_invariants(entry)
    np.testing.assert_array_equal(entry.written, 1)
    np.testing.assert_allclose(
        matrix(entry, entry.read).T @ matrix(entry, entry.written), np.eye(entry.source_size), atol=1e-15
    )


@given(st.one_of(stream_maps(), unit_maps()))
def test_the_contrast_parts_all_copies_and_is_never_heard(entry):
    contrast = entry.contrast
    sums = np.bincount(entry.sources, np.where(entry.created, 0, entry.written * contrast), minlength=entry.source_size)
    np.testing.assert_allclose(sums, 0, atol=1e-13)
    for source in range(entry.source_size):
        own = contrast[(entry.sources == source) & ~entry.created]
        if len(own) == 1:
            assert own == 0
        else:
            assert len(np.unique(own)) == len(own)
            shares = entry.read[(entry.sources == source) & ~entry.created]
            assert np.mean(own**2) == pytest.approx(np.mean(shares**2), rel=1e-12)
    assert np.all(contrast[entry.created] == 0)


@given(SIZES, st.integers(1, 8))
def test_every_share_of_an_axis_is_made_of_the_same_share(sizes, parts):
    source, target = sizes[0] * parts, sizes[1] * parts
    sources = spread(source, target)
    assert np.all(np.diff(sources) >= 0)
    np.testing.assert_array_equal(sources // (source // parts), np.arange(target) // (target // parts))
    for entry in (duplicate_stream(source, target, None, scale_gains=False), pad_units(source, target, tail=False)):
        np.testing.assert_array_equal(entry.sources, sources)


@given(st.integers(1, 6), st.lists(st.integers(-1, 5), min_size=1, max_size=6))
def test_layers_keep_their_order_and_new_ones_stand_behind_those_they_copy(source_size, places):
    after = [place % source_size if place >= 0 else -1 for place in places]
    entry = insert_layers(source_size, after)
    check_invariants(entry)
    np.testing.assert_array_equal(entry.sources[~entry.created], np.arange(source_size))
    assert np.count_nonzero(entry.created) == len(after)
    last = np.maximum.accumulate(np.where(entry.created, -1, entry.sources))  # the layer each stands behind
    np.testing.assert_array_equal(np.sort(after), last[entry.created])
    np.testing.assert_array_equal(entry.sources[entry.created], np.maximum(last[entry.created], 0))


def test_stacks_and_tables_are_what_their_lists_say():
    stacked = stack_layers(2, [0, 1, 0, 1])
    np.testing.assert_array_equal(stacked.copied, [False, False, True, True])
    refined = select_rows(3, [0, 1, 2, 2])
    np.testing.assert_array_equal(refined.copies, [1, 1, 2])
    added = add_rows(3, ((0, 1), None))
    np.testing.assert_array_equal(added.created, [False] * 3 + [True] * 2)
    assert added.mixtures == ((0, 1), None)
    for entry in (stacked, refined, added):
        check_invariants(entry)


@given(st.data())
def test_maps_compose_like_the_matrices_they_are(data):
    source, first, second = sorted(data.draw(st.sets(st.integers(2, 40), min_size=3, max_size=3)))

    def draw_map(before: int, after: int, *, stream: bool) -> IndexMap:
        share, tail = data.draw(SHARES), data.draw(st.booleans())
        if not stream:
            return (
                duplicate_units(before, after, share)
                if data.draw(st.booleans())
                else pad_units(before, after, tail=tail)
            )
        if data.draw(st.booleans()):
            return duplicate_stream(before, after, share, scale_gains=tail)
        return pad_stream(before, after, tail=tail, scale_gains=False)

    stream = data.draw(st.booleans())
    one, two = (draw_map(*sizes, stream=stream) for sizes in ((source, first), (first, second)))
    both = one.then(two)
    check_invariants(both)
    assert both.ratio == pytest.approx(second / source, rel=1e-14)
    for field in ("written", "read"):
        chained = matrix(two, getattr(two, field)) @ matrix(one, getattr(one, field))
        np.testing.assert_allclose(matrix(both, getattr(both, field)), chained, rtol=1e-14)


def test_rows_that_one_growth_begins_are_not_begun_again():
    with pytest.raises(ValueError, match="both plans begin rows"):
        add_rows(3, (None,)).then(add_rows(4, ((3,),)))
