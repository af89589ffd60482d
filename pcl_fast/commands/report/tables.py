"""The tables of a report, as text: a header, and a row of cells for each line."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcl_fast.commands.compare import spread
from pcl_fast.commands.report.measures import BETWEEN, last_values, of_head, of_pairs
from pcl_fast.commands.report.runs import OF_EACH_RUN, FoundRun, Group, text_of

UNKNOWN = "\N{EN DASH}"
RESULTS = ("run", "method", "network", "result", "seeds", "epochs", "top-1 %", "ECE %")
OF_PEERS = ("peers agree", "KL of peers, nats", "distance of peers", "training, s")
SHAPES = {"agreement": "{:.3f}", "kl": "{:.4f}", "distance": "{:.3f}"}
RUNS = ("folder", "run", "seed", "epochs", "last top-1 %", "training, s")


@dataclass(frozen=True, slots=True)
class Cells:
    """A table: its header, its rows, and the number of first columns that are words rather than figures."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int


def results_table(groups: Sequence[Group]) -> Cells:
    """A row for each result of each group; what is true of the group stands in its first row."""
    rows: list[tuple[str, ...]] = []
    for group in groups:
        for number, (result, head) in enumerate(group.headline.items()):
            top1 = _mean(last_values(group, of_head(head, "top1")), "{:.2f}") + _where(group)
            ece = _mean(last_values(group, of_head(head, "ece")), "{:.2f}")
            before = (group.label, group.method, _network(group.runs[0]))
            between = _about_group(group) if number == 0 else ("",) * len(OF_PEERS)
            rows.append((*before, result, _seeds(group), _epochs(group), top1, ece, *between))
    return Cells((*RESULTS, *OF_PEERS), rows, words=6)


def runs_table(groups: Sequence[Group]) -> Cells:
    """A row for each run."""
    rows = [
        (
            str(run.path),
            group.label,
            str(run.config.seed),
            _progress(run),
            ", ".join(f"{result} {_last(run, head)}" for result, head in run.headline.items()),
            UNKNOWN if run.seconds is None else f"{run.seconds:,.0f}",
        )
        for group in groups
        for run in group.runs
    ]
    return Cells(RUNS, rows, words=2)


def settings_tables(groups: Sequence[Group]) -> tuple[Cells, Cells]:
    """The flags that are not the same in all runs, a column for each group; and those that are."""
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in run.flags)
    changed: list[tuple[str, ...]] = []
    common: list[tuple[str, ...]] = []
    for key in keys:
        if key in OF_EACH_RUN:
            continue
        flag = f"--{key.replace('_', '-')}"
        values = [list(dict.fromkeys(text_of(run.flags.get(key)) for run in group.runs)) for group in groups]
        if len({value for own in values for value in own}) > 1:
            changed.append((flag, *(", ".join(own) for own in values)))
        else:
            common.append((flag, values[0][0]))
    header = ("flag", *(group.label for group in groups))
    return Cells(header, changed, words=len(header)), Cells(("flag", "all runs"), common, words=2)


def _about_group(group: Group) -> tuple[str, ...]:
    between = [_mean(last_values(group, of_pairs("peers", name)), SHAPES[name]) for name in BETWEEN]
    seconds = [run.seconds for run in group.counted if run.seconds is not None]
    return (*between, _mean(seconds, "{:,.0f}"))


def _mean(values: Sequence[float], shape: str) -> str:
    """The mean, and the spread over several seeds."""
    if not values:
        return UNKNOWN
    around, mean = spread(values), shape.format(statistics.fmean(values))
    return mean if around is None else f"{mean} \N{PLUS-MINUS SIGN} {shape.format(around)}"


def _where(group: Group) -> str:
    """After which epochs results are, of runs that have not finished."""
    early = [run.last["epoch"] + 1 for run in group.counted if run.last is not None and not run.finished]
    return f" after {_listed(early)}" if early else ""


def _seeds(group: Group) -> str:
    return ", ".join(str(run.config.seed) for run in group.runs)


def _epochs(group: Group) -> str:
    if all(run.finished for run in group.runs):
        return _listed([run.done for run in group.runs])
    shown = [_progress(run) for run in group.runs]
    return (
        shown[0]
        if len(shown) == 1
        else "; ".join(f"seed {run.config.seed}: {text}" for run, text in zip(group.runs, shown, strict=True))
    )


def _progress(run: FoundRun) -> str:
    return str(run.done) if run.finished else f"{run.done} of {run.config.train.epochs}, unfinished"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in dict.fromkeys(numbers))


def _network(run: FoundRun) -> str:
    subset = run.config.data.subset
    part = "" if subset is None else f", {subset:,} images"
    return f"{run.config.model}, {run.config.data.dataset}{part}"


def _last(run: FoundRun, head: str) -> str:
    measure: Callable[..., float | None] = of_head(head, "top1")
    value = None if run.last is None else measure(run.last)
    return UNKNOWN if value is None else f"{value:.2f}"
