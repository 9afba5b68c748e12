"""What a run reports, line by line and for TensorBoard."""

import logging
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from t5pegasus.train.metrics import MetricsWriter, read_metrics


def read_events(folder):
    """The events of TensorBoard's only file there: records of length, checksum, content, checksum."""
    (path,) = folder.iterdir()
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_the_same_numbers_are_in_both_files_at_once(tmp_path):
    with MetricsWriter(tmp_path, -1) as metrics:
        metrics.write("start", 0, note="words")
        metrics.write("train", 2, loss=1.5, tokens=7)
        # While it is still open: what is written can be watched, and is there if the process is killed.
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"kind": "start", "step": 0, "note": "words"},
            {"kind": "train", "step": 2, "loss": 1.5, "tokens": 7},
        ]
        version, start, scalar = read_events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (0, SessionLog.START)
    assert [(value.tag, value.simple_value) for value in scalar.summary.value] == [("train/loss", 1.5)]
    assert scalar.step == 2


def test_records_behind_the_checkpoint_go_and_lines_that_are_none_are_named(tmp_path, caplog):
    with MetricsWriter(tmp_path, -1) as metrics:
        for step in (2, 4, 6):
            metrics.write("train", step, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '[1]\n{"kind": "train"}\n{"step": "4"}\n{"kind": "tr', encoding="utf-8")
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path, 4):
        pass
    assert caplog.text.count("dropping an incomplete line") == 4
    assert [record["step"] for record in read_metrics(path)] == [2, 4]


def test_what_is_dropped_on_opening_is_known_in_its_order(tmp_path):
    with MetricsWriter(tmp_path, -1) as metrics:
        for step in (1, 2, 3, 4, 4, 3, 1):  # equal records are records of their own
            metrics.write("train", step, loss=1.0)
    with MetricsWriter(tmp_path, 2) as metrics:
        assert [record["step"] for record in metrics.dropped] == [3, 4, 4, 3]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 1]


def test_a_measured_peak_is_that_of_the_first_attempt_on_the_same_hardware(tmp_path, monkeypatch):
    measured = iter((100.0, 200.0, 300.0))
    monkeypatch.setattr("t5pegasus.train.metrics.peak_flops", lambda _: (next(measured), "measured"))
    for hardware, wanted in (("one", 100.0), ("one", 100.0), ("other", 200.0), ("one", 100.0), ("other", 200.0)):
        monkeypatch.setattr("t5pegasus.train.metrics.describe_hardware", lambda _, hardware=hardware: hardware)
        with MetricsWriter(tmp_path, 0) as metrics:
            assert metrics.peak == (wanted, "measured")
            metrics.write("start", 0, hardware=hardware, peak_flops_per_device=wanted, peak_source="measured")
    with MetricsWriter(tmp_path, -1) as anew:
        assert anew.peak[0] == 300.0


def test_a_full_disk_is_noticed_where_the_record_is_written(tmp_path, monkeypatch):
    metrics = MetricsWriter(tmp_path, -1)
    metrics.write("train", 1, loss=2.0)
    events = metrics.tensorboard._writer._py_recordio_writer
    with Path("/dev/full").open("wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(events, "_writer", full)
        with pytest.raises(OSError, match="No space left") as raised:
            metrics.write("train", 2, loss=2.0)
        assert raised.value.filename == str(tmp_path / "tensorboard")
    metrics.file.close()
    metrics.file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as raised:
        metrics.write("train", 2, loss=2.0)
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No space left"):
        metrics.close()
