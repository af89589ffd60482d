"""Where a run's records go: metrics.jsonl, curves.png, the terminal."""

from pcl_fast.sinks.base import Record, RunInfo, Sink
from pcl_fast.sinks.console import LiveConsole, PlainConsole
from pcl_fast.sinks.curves import CurvesSink, draw_curves
from pcl_fast.sinks.jsonl import JsonlSink, read_records

__all__ = [
    "CurvesSink",
    "JsonlSink",
    "LiveConsole",
    "PlainConsole",
    "Record",
    "RunInfo",
    "Sink",
    "draw_curves",
    "read_records",
]
