"""TensorBoard's event files, written in the calling thread."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5pegasus.errors import writing


class EventFile:
    """One file of events, in a folder that may have others: a disk that is full is noticed where one is written.

    tensorboardX's SummaryWriter writes them in a thread of its own, and waits for ever once that has failed.
    """

    def __init__(self, folder: Path, purge_step: int):
        """Begin a file; what others say of `purge_step` and later is no longer shown."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue] - made at run time

        self._folder = folder
        folder.mkdir(exist_ok=True)
        with writing(folder):
            self._writer = EventsWriter(str(folder / "events"))
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers by tag, as one event: each event is flushed to the disk."""
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] - made at run time
        from tensorboardX.summary import scalar

        summary = Summary()
        for tag, value in scalars.items():
            summary.MergeFrom(scalar(tag, value))
        if scalars:
            self._write(step=step, summary=summary)

    def write_text(self, step: int, tag: str, markdown: str) -> None:
        """Write a text."""
        from tensorboardX.summary import text

        self._write(step=step, summary=text(tag, markdown))

    def close(self) -> None:
        """Close the file; every event was flushed when it was written."""
        with writing(self._folder):
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made at run time

        with writing(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), **fields))
            self._writer.flush()
