"""Laws of traces: every update that was announced or asked for is in one, and none is begun twice."""

import dataclasses

import jax
import pytest

from t5pegasus.config import TrainConfig
from t5pegasus.train.profiler import Profiler


@pytest.fixture
def traces(monkeypatch):
    """Begin and end, in the order of the calls."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def train(profiler, steps, asked, traces):
    """First and last update of each trace, in the order of the loop."""
    found = []
    for step in range(1, steps + 1):
        if profiler.begins(step):
            profiler.start(step)
            found.append(step)
        if profiler.ends(step):
            profiler.stop()
            found.append(step)
        if step in asked:
            profiler.ask(step)
    profiler.stop()
    assert traces == ["start", "stop"] * traces.count("start")
    return found


@pytest.mark.parametrize(
    ("announced", "asked", "wanted"),
    [
        ("", (), []),
        ("10:12", (), [10, 12]),
        ("10:12", (2,), [3, 7, 10, 12]),
        ("10:12", (7,), [8, 12]),
        ("10:20", (7,), [8, 20]),
        ("10:12", (11,), [10, 16]),
        ("10:12", (12, 20), [10, 12, 13, 17, 21, 25]),
        ("", (3, 5), [4, 10]),
    ],
)
def test_what_was_announced_and_what_is_asked_for_are_both_traced(announced, asked, wanted, traces, tmp_path):
    config = dataclasses.replace(TrainConfig(), profile_steps=announced)
    assert train(Profiler(config, tmp_path), 30, asked, traces) == wanted
