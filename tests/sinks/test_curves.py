"""curves.png: a picture that shows the run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcl_fast.sinks import CurvesSink, JsonlSink, Record, curves, draw_curves
from tests.sinks.history import INFO, make_record, make_run

TITLE = "pcl seed 0"


def drawn(path: Path, records: list[Record]) -> np.ndarray:
    draw_curves(path, {TITLE: records}, {TITLE: INFO.headline})
    return pixels(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1320, 504)
        return np.asarray(image.convert("RGB"))


def ink(picture: np.ndarray) -> int:
    """Pixels that are coloured: neither white nor a shade of grey."""
    return int((np.ptp(picture.astype(int), axis=-1) > 40).sum())


def test_a_picture_of_the_promised_size_with_curves_in_it(tmp_path: Path) -> None:
    nothing, run = drawn(tmp_path / "none.png", []), drawn(tmp_path / "run.png", make_run())
    assert ink(nothing) == 0, "an empty frame is grey"
    left, right = run[:, :660], run[:, 660:]
    assert ink(left) > 500
    assert ink(right) > 500
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["none.png", "run.png"]


def test_other_numbers_are_another_picture(tmp_path: Path) -> None:
    records = make_run()
    same = drawn(tmp_path / "a.png", records)
    assert np.array_equal(same, drawn(tmp_path / "b.png", records))
    records[-1]["val"]["mean_teacher1"]["top1"] = 30.0
    assert not np.array_equal(same, drawn(tmp_path / "c.png", records))


def test_a_single_epoch_is_drawn_as_points(tmp_path: Path) -> None:
    picture = drawn(tmp_path / "a.png", [make_record("epoch", 0, 10)])
    assert ink(picture[:, 300:420]) > 100, "in the middle, where no legend is"
    assert ink(picture[:, 960:1080]) > 100


def test_terms_of_weight_zero_and_epochs_without_evaluation_can_be_drawn(tmp_path: Path) -> None:
    records = [make_record("epoch", epoch, 10 * epoch + 10, measured=False) for epoch in range(3)]
    for record in records:
        record["terms"] = {name: value * name.startswith("ce") for name, value in record["terms"].items()}
    picture = drawn(tmp_path / "a.png", records)
    assert ink(picture[:, :660]) == 0
    assert ink(picture[:, 660:]) > 200, "the cross-entropy is there"


def test_runs_side_by_side(tmp_path: Path) -> None:
    vanilla = [record | {"terms": {"ce/peer1": 2.0}} for record in make_run()]
    headlines = {TITLE: INFO.headline, "vanilla seed 0": {"vanilla": "peer1"}}
    draw_curves(tmp_path / "both.png", {TITLE: make_run(), "vanilla seed 0": vanilla}, headlines)
    assert ink(pixels(tmp_path / "both.png")) > 1000


def test_the_sink_draws_what_metrics_jsonl_holds_at_most_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(curves.time, "monotonic", lambda: now)
    metrics, sink = JsonlSink(tmp_path / "m.jsonl"), CurvesSink(tmp_path / "c.png", tmp_path / "m.jsonl")
    for each in (metrics, sink):
        each.started(INFO)
    drawn_at: list[float] = []
    for record in make_run(4):
        now += 25
        before = (tmp_path / "c.png").stat().st_mtime_ns if (tmp_path / "c.png").exists() else 0
        for each in (metrics, sink):
            each.recorded(record)
        if (tmp_path / "c.png").exists() and (tmp_path / "c.png").stat().st_mtime_ns != before:
            drawn_at.append(now)
    assert drawn_at == [100.0, 200.0], "epochs end at 50, 100, 150, 200"
    halfway = pixels(tmp_path / "c.png")
    for each in (metrics, sink):
        each.closed()
    assert np.array_equal(pixels(tmp_path / "c.png"), halfway), "the last epoch was already drawn"
    (tmp_path / "c.png").unlink()
    sink.closed()
    assert np.array_equal(pixels(tmp_path / "c.png"), halfway)
