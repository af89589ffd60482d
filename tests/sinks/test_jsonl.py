"""metrics.jsonl: whole lines only, and exactly those of the steps that count."""

import json
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.sinks import JsonlSink, RunInfo, read_records
from tests.tiny import files_limited_to

RECORDS: list[dict[str, Any]] = [
    {"kind": "step", "step": n, "loss": n / 3, "é": "\u2028"} for n in range(1, 6)
]


def info(first_record: int) -> RunInfo:
    return RunInfo("t", Path("run"), 2, 4, first_step=0, first_record=first_record, headline={})


def written(path: Path, records: list[dict[str, Any]], first_record: int = 0) -> None:
    sink = JsonlSink(path)
    sink.started(info(first_record))
    for record in records:
        sink.recorded(record)
    sink.closed()


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", RECORDS)
    assert read_records(tmp_path / "metrics.jsonl") == RECORDS
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == RECORDS
    assert lines[-1] == b""


def test_a_record_is_visible_before_the_file_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.started(info(0))
    sink.recorded(RECORDS[0])
    assert read_records(tmp_path / "metrics.jsonl") == RECORDS[:1]
    sink.closed()


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_resuming_drops_the_records_past_the_checkpoint(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, RECORDS)
    written(path, [{"again": 1}], first_record=kept)
    assert read_records(path) == [*RECORDS[:kept], {"again": 1}]


def test_wherever_a_line_is_torn_the_whole_ones_before_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, RECORDS[:3])
    content = path.read_bytes()
    ends = [place for place, byte in enumerate(content, start=1) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert read_records(path) == RECORDS[:whole]


def test_a_torn_line_is_gone_after_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, RECORDS[:2])
    path.write_bytes(path.read_bytes()[:-4])
    written(path, [RECORDS[1]], first_record=2)
    assert read_records(path) == RECORDS[:2]
    assert path.read_bytes().count(b"\n") == 2


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("room", [0, 1, 30])
def test_what_a_full_disk_refuses_is_kept_for_the_next_time(tmp_path: Path, room: int) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.started(info(0))
    sink.recorded(RECORDS[0])
    with files_limited_to(path.stat().st_size + room):
        for record in RECORDS[1:3]:
            with pytest.raises(OSError, match="File too large"):
                sink.recorded(record)
        assert read_records(path) == RECORDS[:1]
    sink.recorded(RECORDS[3])
    assert read_records(path) == RECORDS[:4]
    sink.closed()


def test_what_a_full_disk_refused_last_is_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.started(info(0))
    with files_limited_to(10), pytest.raises(OSError, match="File too large"):
        sink.recorded(RECORDS[0])
    sink.closed()
    assert read_records(path) == RECORDS[:1]
