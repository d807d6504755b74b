"""An event file as TensorBoard's own writer has it: fixtures/events.tfevents, which the worker's tests compare with theirs.

usage: events.py        (Python with tensorboard)
"""

import pathlib

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

BEGAN = 1_700_000_000.25
LINES = [
    (0.0, 0, [("eval/loss", 1.3), ("eval/base_loss", 1.3)]),
    (2.5, 300, [("train/loss", 0.75), ("train/epoch", 1.5), ("train/learning_rate", 0.003), ("train/tokens_per_second", 1000.0), ("train/wait_seconds", 0.125)]),
    (2.5, 300, [("eval/loss", 0.5), ("eval/accuracy", 0.875), ("eval/general_loss", 5.0), ("eval/base_general_loss", 4.75)]),
]


def main() -> None:
    path = pathlib.Path(__file__).parent / "fixtures" / "events.tfevents"
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=BEGAN, file_version="brain.Event:2").SerializeToString())
        for seconds, step, scalars in LINES:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars])
            writer.write(Event(wall_time=BEGAN + seconds, step=step, summary=summary).SerializeToString())
    print(f"{path.stat().st_size} bytes in {path}")


if __name__ == "__main__":
    main()
