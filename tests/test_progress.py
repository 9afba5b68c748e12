"""Progress reports to its stream, rarely, and never claims more than all."""

import io

from t5pegasus import progress as module
from t5pegasus.progress import Progress, format_count, format_seconds


def test_numbers_for_people():
    assert [format_count(n) for n in (0, 9.46, 950, 9999, 12_345, 3_200_000, 1.1e9)] == [
        "0", "9.5", "950", "9999", "12.3k", "3.2M", "1.1G",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (8, 185, 7620)] == ["8 s", "3 min 05 s", "2 h 07 min"]


def test_short_work_is_silent_off_a_terminal():
    stream = io.StringIO()
    with Progress("work", total=5, stream=stream) as progress:
        for _ in range(5):
            progress.advance()
    assert stream.getvalue() == ""


def test_lines_carry_share_rate_and_time_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress("work", total=400, unit="documents", stream=stream) as progress:
        progress.skip(100)
        for seconds in (5.0, 11.0, 12.0):
            now = seconds
            progress.advance(50)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "work: 200/400 documents (50 %), 9.1/s, 22 s left",
        "work: 250/400 documents (62 %), 12/s, 12 s left",
    ]


def test_a_low_estimate_is_forgotten_when_it_is_passed(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress("work", total=10, stream=stream)
    now = 20.0
    progress.advance(40)
    assert stream.getvalue() == "work: 40 items, 2/s, 20 s\n"


def test_the_last_line_is_not_said_twice_off_a_terminal():
    stream = io.StringIO()
    with Progress("work", unit="texts", stream=stream) as progress:
        progress._interval = 0.0
        progress.advance(2)
    assert len(stream.getvalue().splitlines()) == 1


def test_the_end_is_said_once_with_what_is_known_on_leaving(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress("train", total=2, unit="steps", stream=stream) as progress:
        for now in (11.0, 22.0):
            progress.advance()
            progress.detail = f"loss {33 - now:g}"
    assert stream.getvalue().splitlines() == [
        "train: 1/2 steps (50 %), 0.1/s, 11 s left",
        "train: 2/2 steps (100 %), 0.1/s, 22 s, loss 11",
    ]
