"""`pcl-fast report RUN...`: reads runs, draws them, and writes the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from pcl_fast import atomic
from pcl_fast.commands.flags import read_flags
from pcl_fast.commands.report.page import Picture, Section, folded, page, paragraph, picture, table
from pcl_fast.commands.report.plots import draw_between, draw_calibration, draw_pairs, draw_results
from pcl_fast.commands.report.runs import Group, find_runs, group_runs
from pcl_fast.commands.report.tables import results_table, runs_table, settings_tables
from pcl_fast.errors import ConfigError
from pcl_fast.sinks import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
RESULTS_NOTE = (
    "Of the last epoch, as mean ± standard deviation over the seeds. Runs that have not finished "
    "count only where none has. ECE: expected calibration error of the top-1 answers, 15 bins. Peers: means "
    "over all pairs of peers on the test images, at temperature 1. Seconds: all processes of a run, from "
    "start to end. A dash: not written down."
)
CURVES = "Lines: mean over the seeds; bands: one standard deviation. Losses of methods have other terms."
CALIBRATION = "How far confidence is from accuracy, on the test images, in percent."
BETWEEN = (
    "On the test images, mean over all pairs of a kind. KL(p || q) at temperature 1: both ways between alike "
    "heads; from the ensemble p to a peer q. Distance: Euclidean, of the softmax outputs."
)
NOTHING_BETWEEN = "Nothing: each run has one head, or is of a version that did not measure it."


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Runs side by side: curves, results, how alike peers are, settings that differ; PNGs and one page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of several runs (then each of them)"""
    out: Path | None = None
    """Where report.html and its pictures go; by default the folder, if one is given, else ./report"""


def main(words: Sequence[str]) -> None:
    """Write the report, and say where it is."""
    arguments = read_flags(ReportArguments, words, "pcl-fast report")
    if not arguments.runs:
        raise ConfigError("no run given; give folders of runs, as: pcl-fast report runs/one runs/other")
    groups = group_runs(find_runs(arguments.runs))
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path("report"))
    atomic.write_text(out / PAGE, _page(groups, out))
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        if not run.finished:
            say(f"unfinished: {run.path}: {run.done} of {run.config.train.epochs} epochs")
    say(f"{out / PAGE}: {len(runs)} run{'s' * (len(runs) > 1)}; its pictures beside it")


def _page(groups: Sequence[Group], out: Path) -> str:
    """The page; its pictures are written on the way."""
    changed, common = settings_tables(groups)
    runs = sum(len(group.runs) for group in groups)
    between = _drawn(draw_between(groups), out / "report-between.png", BETWEEN)
    differing = table("differences", changed) if changed.rows else paragraph("None.")
    sections = [
        Section("Results", table("results", results_table(groups)) + paragraph(RESULTS_NOTE)),
        Section("Curves", _drawn(draw_results(groups), out / "report-curves.png", CURVES)),
        Section("How alike the heads are", (between or paragraph(NOTHING_BETWEEN)) + _maps(groups, out)),
    ]
    calibration = _drawn(draw_calibration(groups), out / "report-calibration.png", CALIBRATION)
    if calibration:
        sections.append(Section("Calibration", calibration))
    settings = differing + folded(f"{len(common.rows)} settings that all runs share", table("common", common))
    sections += [
        Section("Settings that differ", settings),
        Section("Runs", table("runs", runs_table(groups))),
    ]
    note = "Runs that differ in nothing but their seed are shown as one."
    return page(f"pcl-fast report of {runs} run{'s' * (runs > 1)}", note, sections)


def _maps(groups: Sequence[Group], out: Path) -> str:
    """The pairs of heads, for a run of each method that has any."""
    shown: dict[str, str] = {}
    for group in groups:
        for run in group.counted[:1] if group.method not in shown else ():
            assert run.last is not None
            caption = (
                f"{group.label}, seed {run.config.seed}, after epoch {run.last['epoch'] + 1}: every pair of "
                "heads; of KL(p || q), p is the row and q the column."
            )
            drawn = _drawn(draw_pairs(run), out / f"report-pairs-{group.method}.png", caption)
            if drawn:
                shown[group.method] = drawn
    return "\n".join(shown.values())


def _drawn(figure: "Figure | None", path: Path, caption: str) -> str:
    """A figure within the page, written to `path`, too; nothing of none."""
    if figure is None:
        return ""
    save_figure(figure, path)
    return picture(Picture(path.read_bytes(), caption))
