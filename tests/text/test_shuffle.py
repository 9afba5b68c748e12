import numpy as np

from t5pegasus.text.shuffle import order_key, shuffled_order


def test_the_order_is_a_permutation_that_depends_on_seed_and_identifiers_alone():
    names = [f"文件:{index}" for index in range(1000)]
    order = shuffled_order(1, names)
    assert sorted(order.tolist()) == list(range(1000))
    backwards = shuffled_order(1, names[::-1])
    assert [names[i] for i in order] == [names[::-1][i] for i in backwards]
    assert not np.array_equal(order, shuffled_order(2, names))


def test_keys_never_change_between_versions_and_machines():
    # An order that moved would make a resumed build write other bytes.
    assert order_key(0, "a") == 0x3A030DABA6EC79B9
    assert order_key(2**32 - 1, "文件.jsonl:7") == 0xD6CCB920B061AAB0


def test_keys_are_spread_evenly():
    keys = np.array([order_key(0, str(index)) for index in range(4000)], np.uint64)
    counts = np.bincount((keys >> np.uint64(60)).astype(int), minlength=16)
    assert counts.min() > 180
    assert counts.max() < 320
    assert shuffled_order(0, ["x", "x", "x"]).tolist() == [0, 1, 2]
