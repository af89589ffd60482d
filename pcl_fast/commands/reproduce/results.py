"""What the runs of a table have reached, beside the paper: in the terminal, as Markdown, CSV and JSON."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from pcl_fast import atomic
from pcl_fast.commands.compare import spread
from pcl_fast.commands.reproduce.planned import Planned
from pcl_fast.objectives import make_objective
from pcl_fast.paper import TABLES, Reported
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import evaluations, read_records

OURS = ("network", "method", "result", "seeds", "mean", "std", "over vanilla")
OF_PAPER = ("paper", "difference", "agrees")


@dataclass(frozen=True, slots=True)
class Line:
    """A result of a method on a network: top-1 in percent after the last epoch, for each finished seed."""

    row: str
    variant: str
    result: str
    top1: tuple[float, ...]
    over_vanilla: float | None
    paper: Reported | None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float | None:
        """Over the seeds; None of one."""
        return spread(self.top1)

    @property
    def agrees(self) -> bool | None:
        """Whether the paper's mean is within two spreads, theirs and ours together; None without one."""
        if self.paper is None or self.paper.std is None or self.std is None:
            return None
        return abs(self.mean - self.paper.mean) <= 2 * math.hypot(self.std, self.paper.std)

    def cells(self) -> tuple[str, ...]:
        """As text, by OURS."""
        return (
            self.row,
            self.variant,
            self.result,
            "  ".join(f"{value:.2f}" for value in self.top1),
            f"{self.mean:.2f}",
            "" if self.std is None else f"{self.std:.2f}",
            "" if self.over_vanilla is None else f"{self.over_vanilla:+.2f}",
        )

    def beside_paper(self) -> tuple[str, ...]:
        """As text, by OF_PAPER; a figure that was not read in the paper itself is in brackets."""
        paper = self.paper
        if paper is None:
            return ("", "", "")
        reported = f"{paper.mean:.2f}" + (f" +- {paper.std:.2f}" if paper.std is not None else "")
        agrees = "" if self.agrees is None else ("yes" if self.agrees else "no")
        return reported if paper.certain else f"({reported})", f"{self.mean - paper.mean:+.2f}", agrees


def reached(run: Planned) -> dict[str, float] | None:
    """Top-1 of each result of a run after its last epoch; None before that."""
    evaluated = evaluations(read_records(RunFolder(run.folder).metrics))
    if not evaluated or evaluated[-1]["epoch"] + 1 < run.config.train.epochs:
        return None
    headline = make_objective(run.config).headline
    return {name: evaluated[-1]["val"][head]["top1"] for name, head in headline.items()}


def lines_of(table: str, runs: Sequence[Planned], comparable: bool) -> list[Line]:
    """A line for each result of each method and network that has a finished run.

    Unless runs are `comparable` with the paper's, its figures are left out.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        for result, top1 in (reached(run) or {}).items():
            found.setdefault((run.row, run.variant, result), []).append(top1)
    alone = {row: statistics.fmean(top1) for (row, variant, _), top1 in found.items() if variant == "vanilla"}
    lines: list[Line] = []
    for (row, variant, result), top1 in found.items():
        over = statistics.fmean(top1) - alone[row] if row in alone and variant != "vanilla" else None
        paper = TABLES.get(table, {}).get(row, {}).get(result) if comparable else None
        lines.append(Line(row, variant, result, tuple(top1), over, paper))
    rows = list(dict.fromkeys(run.row for run in runs))
    return sorted(lines, key=lambda line: rows.index(line.row))


def as_table(title: str, lines: Sequence[Line]) -> Table:
    """For the terminal."""
    table = Table(title=title, title_justify="left")
    header, *rows = _grid(lines)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 3 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def write_files(folder: Path, title: str, lines: Sequence[Line]) -> None:
    """table.md, table.csv and table.json."""
    header, *rows = _grid(lines)
    ruled = [header, ("---",) * len(header), *rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
    atomic.write_text(folder / "table.md", f"# {title}\n\n{body}\n")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic.write_text(folder / "table.csv", text.getvalue())
    content = [asdict(line) | {"mean": line.mean, "std": line.std, "agrees": line.agrees} for line in lines]
    atomic.write_text(folder / "table.json", json.dumps({"title": title, "lines": content}, indent=2) + "\n")


def _grid(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The header and all cells; the paper's where any line has its figures."""
    if all(line.paper is None for line in lines):
        return [OURS, *(line.cells() for line in lines)]
    return [(*OURS, *OF_PAPER), *((*line.cells(), *line.beside_paper()) for line in lines)]
