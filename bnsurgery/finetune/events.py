"""Write a run's measurements for TensorBoard."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from bnsurgery.files.writing import make_folder, unwritable


class EventFile:
    """One of the files that TensorBoard merges into a run, with the curves of one process.

    torch's SummaryWriter writes in a thread, where a full disk would only print a traceback.

    TensorBoard ignores `first_step` and later steps in earlier files: a killed run may have written beyond its
    checkpoint.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = make_folder(folder) / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(step=first_step, session_log=start))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write one point of every curve."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, *events: Event) -> None:
        try:
            with self.path.open("ab") as file:
                records = RecordWriter(file)
                for event in events:
                    event.wall_time = time.time()
                    records.write(event.SerializeToString())
        except OSError as error:
            raise unwritable(self.path, error) from error
