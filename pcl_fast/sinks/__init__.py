"""Where a run's records go: metrics.jsonl, curves.png, the terminal."""

from pcl_fast.sinks.base import Record, RunInfo, Sink
from pcl_fast.sinks.console import LiveConsole, PlainConsole
from pcl_fast.sinks.curves import CurvesSink, draw_curves, line_or_points, save_figure
from pcl_fast.sinks.jsonl import JsonlSink, check_whole, evaluations, read_records

__all__ = [
    "CurvesSink",
    "JsonlSink",
    "LiveConsole",
    "PlainConsole",
    "Record",
    "RunInfo",
    "Sink",
    "check_whole",
    "draw_curves",
    "evaluations",
    "line_or_points",
    "read_records",
    "save_figure",
]
