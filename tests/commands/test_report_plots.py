"""The pictures of a report: what is drawn is what was measured, and nothing covers it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from pcl_fast.commands.report import plots
from pcl_fast.commands.report.measures import KINDS, curve, loss, of_pairs, pairs_of
from pcl_fast.commands.report.runs import FoundRun, Group
from pcl_fast.sinks import Record
from tests.sinks.history import make_record
from tests.tiny import tiny_config

Draw = Callable[[Sequence[Group]], Figure | None]
HEADLINE = {"PCL": "mean_teacher1", "PCL-E": "mean_ensemble"}
HEADS = ["peer1", "peer2", "ensemble", "mean_teacher1", "mean_teacher2", "mean_ensemble"]
EPOCHS = 6


def make_records(seed: int, epochs: int = EPOCHS) -> list[Record]:
    """Made up at random."""
    draws = np.random.default_rng(seed)
    records: list[Record] = []
    for epoch in range(epochs):
        record = make_record("epoch", epoch, 10 * epoch + 10)
        record["loss"] = draws.uniform(1, 9)
        matrices = {
            name: draws.uniform(0.1, 0.9, (6, 6)).tolist() for name in ("agreement", "kl", "distance")
        }
        for head in record["val"].values():
            head |= {"top1": draws.uniform(10, 90), "ece": draws.uniform(1, 20)}
        records.append(record | {"between": {"heads": HEADS} | matrices})
    return records


def make_group(label: str, *seeds: int, epochs: int = EPOCHS) -> Group:
    config = tiny_config(train={"epochs": EPOCHS})
    runs = [FoundRun(Path(f"{s}"), config, HEADLINE, make_records(s, epochs), None) for s in seeds]
    return Group(label, tuple(runs))


def top1(seed: int, head: str) -> list[float]:
    return [record["val"][head]["top1"] for record in make_records(seed)]


def test_a_line_is_the_mean_over_the_seeds_and_its_band_their_spread() -> None:
    axes = plots.draw_results([make_group("a", 1, 2, 3), make_group("b", 4)]).axes[0]
    values = np.array([top1(seed, "mean_teacher1") for seed in (1, 2, 3)])
    line = axes.lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), values.mean(0))
    band = axes.collections[0].get_paths()[0].vertices
    corners = {(int(x), round(float(y), 6)) for x, y in np.asarray(band)}
    for sign in (-1, 1):
        edge = values.mean(0) + sign * values.std(0, ddof=1)
        assert {(n, round(y, 6)) for n, y in enumerate(edge.tolist(), 1)} <= corners
    assert len(axes.lines) == 4, "two results of two groups"
    assert len(axes.collections) == 2, "of one seed there is no band"
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-", "--"]
    assert [line.get_label() for line in axes.lines] == ["a: PCL", "a: PCL-E", "b: PCL", "b: PCL-E"]


def test_the_last_third_is_shown_again_and_the_loss_beside_it() -> None:
    _, end, losses = plots.draw_results([make_group("a", 1)]).axes
    assert np.asarray(end.lines[1].get_xdata()).tolist() == [4, 5, 6]
    assert np.asarray(end.lines[1].get_ydata()).tolist() == top1(1, "mean_ensemble")[3:]
    assert np.asarray(losses.lines[0].get_ydata()).tolist() == [record["loss"] for record in make_records(1)]


def test_seeds_that_have_not_come_as_far_count_where_they_are() -> None:
    group = Group("a", (*make_group("", 1).runs, *make_group("", 2, epochs=2).runs))
    found, one, other = curve(group.runs, loss), make_records(1), make_records(2)
    assert found.at == [1, 2, 3, 4, 5, 6]
    assert found.mean[1] == (one[1]["loss"] + other[1]["loss"]) / 2
    assert found.mean[2:] == [record["loss"] for record in one[2:]]
    assert found.spread[2:] == [0] * 4
    assert found.spread[0] == pytest.approx(abs(one[0]["loss"] - other[0]["loss"]) / math.sqrt(2))


def test_between_is_the_mean_over_the_pairs_of_a_kind() -> None:
    record = make_records(1)[-1]
    between = record["between"]
    kl = np.array(between["kl"])
    assert of_pairs("peers", "kl")(record) == pytest.approx((kl[0, 1] + kl[1, 0]) / 2)
    assert of_pairs("mean_teachers", "kl")(record) == pytest.approx((kl[3, 4] + kl[4, 3]) / 2)
    assert of_pairs("ensemble", "kl")(record) == pytest.approx((kl[2, 0] + kl[2, 1]) / 2)
    assert pairs_of("ensemble", ["peer1", "peer2"]) == []
    assert pairs_of("mean_teachers", ["peer1", "peer2"]) == []
    figure = plots.draw_between([make_group("a", 1)])
    assert figure is not None
    grid = np.array(figure.axes).reshape(3, 3)
    for row, name in zip(grid, ("agreement", "kl", "distance"), strict=True):
        for axes, kind in zip(row, KINDS, strict=True):
            expected = [of_pairs(kind, name)(each) for each in make_records(1)]
            assert np.asarray(axes.lines[0].get_ydata()).tolist() == expected


def test_a_heat_map_shows_every_pair() -> None:
    run = make_group("a", 1).runs[0]
    figure = plots.draw_pairs(run)
    assert figure is not None
    assert run.last is not None
    maps = [axes for axes in figure.axes if axes.images]
    for axes, name in zip(maps, ("agreement", "kl", "distance"), strict=True):
        shown, matrix = axes.images[0].get_array(), np.array(run.last["between"][name])
        assert shown is not None
        off = ~np.eye(6, dtype=bool)
        np.testing.assert_array_equal(shown[off], matrix[off])
        written = [text.get_text() for text in axes.texts]
        assert written == [f"{value:.2f}" for value in matrix[off]]
    assert [label.get_text() for label in maps[0].get_yticklabels()][3] == "mean teacher 1"


@pytest.mark.parametrize("draw", [plots.draw_results, plots.draw_between, plots.draw_calibration])
@pytest.mark.parametrize("name", ["pcl", "group with a long name", "long " * 16])
def test_no_legend_covers_a_curve_though_there_are_twelve_groups(draw: Draw, name: str) -> None:
    figure = draw([make_group(f"{name} {n}", n) for n in range(12)])
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= figure.bbox.y0
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert not box.overlaps(legend)
        assert axes.get_window_extent().height > 100


def test_groups_look_different() -> None:
    axes = plots.draw_results([make_group(str(n), n) for n in range(20)]).axes[2]
    looks = {(to_rgba(line.get_color()), str(line.get_marker())) for line in axes.lines}
    assert len(looks) == 20


def test_what_nobody_measured_is_not_drawn() -> None:
    old = make_group("a", 1)
    for record in old.runs[0].epochs:
        del record["between"]
        for head in record["val"].values():
            del head["ece"]
    assert plots.draw_between([old]) is None
    assert plots.draw_calibration([old]) is None
    assert plots.draw_pairs(old.runs[0]) is None
