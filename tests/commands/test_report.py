"""`pcl-fast report RUN...`: the page against metrics.jsonl, and what cannot be reported."""

import base64
import io
import json
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcl_fast.cli import main
from pcl_fast.commands.report.runs import find_runs, group_runs
from pcl_fast.commands.report.tables import results_table, settings_tables
from pcl_fast.sinks import Record
from tests.tiny import files_limited_to, tiny_config, train

UNKNOWN = "\N{EN DASH}"
pytestmark = pytest.mark.timeout(120)  # four trainings and a report of them all
PICTURES = ("report-curves.png", "report-between.png", "report-calibration.png")
RUNS = {"pcl-0": ("pcl", 0), "pcl-1": ("pcl", 1), "dml": ("dml", 0), "vanilla": ("vanilla", 0)}
HEADLINES = {"vanilla": {"vanilla": "peer1"}, "dml": {"DML": "peer1"}}
HEADLINES["pcl"] = {"PCL": "mean_teacher1", "PCL-E": "mean_ensemble"}


class Page(HTMLParser):
    """The tables of a page by their id, the bytes of its pictures, and all that leads out of it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[bytes] = []
        self.outside: list[str] = []
        self.text = self._cell = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag in ("script", "link", "iframe", "object"):
            self.outside.append(tag)
        for key, value in attrs:
            if value and key in ("src", "href", "srcset") and not value.startswith("data:"):
                self.outside.append(value)
        if tag == "img":
            source = given["src"] or ""
            self.pictures.append(
                base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
            )
        elif tag == "table":
            self._rows = self.tables.setdefault(given["id"] or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._rows[-1].append(self._cell)

    def handle_data(self, data: str) -> None:
        self.text += data
        self._cell += data

    def rows(self, name: str) -> list[dict[str, str]]:
        """A table's rows, each by the columns' names."""
        return by_column(*self.tables[name])


def by_column(header: Sequence[str], *rows: Sequence[str]) -> list[dict[str, str]]:
    return [dict(zip(header, row, strict=True)) for row in rows]


def results_of(*folders: Path) -> list[dict[str, str]]:
    """The table of results, without a page and its pictures, which take seconds."""
    cells = results_table(group_runs(find_runs(folders)))
    return by_column(cells.header, *cells.rows)


def epochs_of(run: Path) -> list[Record]:
    """Read without the product."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "epoch"]


def rewrite(run: Path, change: Callable[[Record], Record]) -> None:
    lines = [json.dumps(change(record)) + "\n" for record in epochs_of(run)]
    (run / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (method, seed) in RUNS.items():
        train(folder / name, tiny_config(method=method, seed=seed, train={"epochs": 3}))
    return folder


@pytest.fixture(scope="module")
def page(trained: Path) -> Page:
    """The report of them all, beside them."""
    assert report(trained) == 0
    return Page(trained / "report.html")


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """What a report reads of them, to be changed at will."""
    for name in RUNS:
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("config.json", "metrics.jsonl", "starts.jsonl"):
            (tmp_path / "runs" / name / file).write_bytes((trained / name / file).read_bytes())
    return tmp_path / "runs"


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """What a report that cannot be made says: one line, and nothing is written."""
    assert report(*words) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def shown(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def peers(record: Record, measure: str) -> float:
    """The mean over all ordered pairs of peers."""
    between = record["between"]
    at = [n for n, head in enumerate(between["heads"]) if re.fullmatch(r"peer\d", head)]
    return float(np.mean([between[measure][i][j] for i in at for j in at if i != j]))


def seconds(run: Path) -> float:
    """Of a run that one process has made."""
    began, ended = (
        np.datetime64(json.loads(line)["time"].removesuffix("+00:00"))
        for line in (run / "starts.jsonl").read_text().splitlines()
    )
    return float((ended - began) / np.timedelta64(1, "s"))


def test_every_result_is_that_of_the_last_record(trained: Path, page: Page) -> None:
    expected: list[list[str]] = []
    for method in ("vanilla", "dml", "pcl"):
        of_method = [trained / name for name, (own, _) in RUNS.items() if own == method]
        last = [epochs_of(run)[-1] for run in of_method]
        assert [record["epoch"] for record in last] == [2] * len(last)
        for number, (result, head) in enumerate(HEADLINES[method].items()):
            row = [method, method, "resnet8, cifar10", result, ", ".join("01"[: len(last)]), "3"]
            row += [shown([record["val"][head][key] for record in last], 2) for key in ("top1", "ece")]
            if number:
                row += [""] * 4
            else:
                digits = {"agreement": 3, "kl": 4, "distance": 3}
                alone = method == "vanilla"
                row += [
                    UNKNOWN if alone else shown([peers(record, key) for record in last], places)
                    for key, places in digits.items()
                ]
                row += [shown([seconds(run) for run in of_method], 0)]
            expected.append(row)
    assert page.tables["results"][1:] == expected
    assert [row["folder"] for row in page.rows("runs")] == [
        str(trained / name) for name in ("vanilla", "dml", "pcl-0", "pcl-1")
    ]


def test_the_page_needs_nothing_but_itself(trained: Path, page: Page) -> None:
    assert page.outside == []
    assert not re.search(r"https?:|url\(|@import", (trained / "report.html").read_text())
    names = {path.name: path.read_bytes() for path in trained.glob("*.png")}
    assert names.keys() == {*PICTURES, "report-pairs-dml.png", "report-pairs-pcl.png"}
    assert sorted(page.pictures) == sorted(names.values())
    for data in page.pictures:
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "PNG"
            assert picture.width > 1000
            assert np.asarray(picture.convert("L")).std() > 5, "something is drawn"
    assert not list(trained.glob(".*.part"))


def test_the_settings_are_on_the_page(page: Page) -> None:
    assert page.tables["differences"] == [
        ["flag", "vanilla", "dml", "pcl"],
        ["--method", "vanilla", "dml", "pcl"],
    ]
    common = dict(page.tables["common"])
    assert common["--optim.lr"] == "0.1"
    assert common["--deterministic"] == "no"


def test_settings_that_differ_and_those_that_do_not(runs: Path) -> None:
    rewrite_config(runs / "pcl-1", ("optim", "lr"), 0.05)
    changed, same = settings_tables(group_runs(find_runs([runs])))
    assert changed.header == ("flag", "vanilla", "dml", "pcl, lr 0.1", "pcl, lr 0.05")
    assert changed.rows == [
        ("--method", "vanilla", "dml", "pcl", "pcl"),
        ("--optim.lr", "0.1", "0.1", "0.1", "0.05"),
    ]
    common = {flag: value for flag, value in same.rows}  # noqa: C416
    assert common["--train.epochs"] == "3"
    assert common["--pcl.ema-decay"] == "0.7"
    assert common["--train.skip-at-most"] == "3"
    assert not common.keys() & {"--optim.lr", "--method", "--seed", "--run-dir"}
    assert [(row["run"], row["seeds"]) for row in results_of(runs)][2:] == [
        ("pcl, lr 0.1", "0"),
        ("pcl, lr 0.1", "0"),
        ("pcl, lr 0.05", "1"),
        ("pcl, lr 0.05", "1"),
    ]


def rewrite_config(run: Path, place: tuple[str, ...], value: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (run / "config.json").write_text(json.dumps(config))


def test_where_a_run_lies_and_on_what_it_ran_do_not_tell_it_apart(runs: Path) -> None:
    rewrite_config(runs / "pcl-1", ("run_dir",), "elsewhere")
    rewrite_config(runs / "pcl-1", ("train", "log_every"), 17)
    assert [row["seeds"] for row in results_of(runs) if row["method"] == "pcl"] == ["0, 1"] * 2
    changed, _ = settings_tables(group_runs(find_runs([runs])))
    assert ("--train.log-every", "3", "3", "3, 17") in changed.rows


def test_much_that_differs_is_named_by_the_folder_without_its_seed(runs: Path) -> None:
    for number in range(2):
        (runs / f"pcl-{number}").rename(runs / f"usual-seed{number}")
        shutil.copytree(runs / f"usual-seed{number}", runs / f"other-seed{number}")
        for place in ("temperature", "distill_weight", "ema_decay"):
            rewrite_config(runs / f"other-seed{number}", ("pcl", place), 0.5)
    labels = [group.label for group in group_runs(find_runs([runs]))]
    assert labels == ["vanilla", "dml", "pcl (other)", "pcl (usual)"]


def test_the_same_settings_and_seed_twice_are_two_groups(runs: Path) -> None:
    rewrite_config(runs / "pcl-1", ("seed",), 0)
    rows = results_of(runs / "pcl-0", runs / "pcl-1")
    assert [(row["run"], row["seeds"]) for row in rows[::2]] == [("pcl (pcl-0)", "0"), ("pcl (pcl-1)", "0")]


def test_teachers_of_their_own_seed_do_not_tell_seeds_apart(runs: Path) -> None:
    for name, seed, teacher in (("dml", 3, "t/net-seed3"), ("vanilla", 4, "t/net-seed4"), ("pcl-0", 5, None)):
        rewrite_config(runs / name, ("method",), "kd")
        rewrite_config(runs / name, ("seed",), seed)
        rewrite_config(runs / name, ("kd", "teacher"), teacher or str(runs / name / "teacher"))
    rows = results_of(runs / "dml", runs / "vanilla", runs / "pcl-0")
    assert [(row["run"], row["seeds"]) for row in rows] == [
        ("kd, teacher t/net-seed", "3, 4"),
        ("kd, teacher teacher", "5"),
    ]


def test_records_of_older_versions(runs: Path) -> None:
    def older(record: Record) -> Record:
        record.pop("between", None)
        for head in record["val"].values():
            head.pop("ece")
        return record

    run = runs / "pcl-0"
    rewrite(run, older)
    (run / "starts.jsonl").unlink()
    assert report(run) == 0
    page = Page(run / "report.html")
    assert {path.name for path in run.glob("*.png")} == {"report-curves.png"}
    assert len(page.pictures) == 1
    assert "did not measure it" in page.text
    first = page.rows("results")[0]
    assert [first[key] for key in ("ECE %", "peers agree", "training, s")] == [UNKNOWN] * 3
    assert first["top-1 %"] == f"{epochs_of(run)[-1]['val']['mean_teacher1']['top1']:.2f}"


def test_a_run_that_has_not_finished_counts_only_where_none_has(runs: Path) -> None:
    for name, kept in (("pcl-1", 2), ("dml", 1), ("vanilla", 0)):
        lines = [json.dumps(record) + "\n" for record in epochs_of(runs / name)[:kept]]
        (runs / name / "metrics.jsonl").write_text("".join(lines) + '{"kind": "epo')  # killed while it wrote
        entries = (runs / name / "starts.jsonl").read_text().splitlines(keepends=True)
        (runs / name / "starts.jsonl").write_text(entries[0])
    vanilla, dml, pcl, _ = results_of(runs)
    assert (vanilla["epochs"], vanilla["top-1 %"]) == ("0 of 3, unfinished", UNKNOWN)
    assert dml["epochs"] == "1 of 3, unfinished"
    assert dml["top-1 %"] == f"{epochs_of_whole(runs / 'dml')[-1]['val']['peer1']['top1']:.2f} after 1"
    assert dml["training, s"] == UNKNOWN, "one that has not ended took an unknown time"
    assert pcl["epochs"] == "seed 0: 3; seed 1: 2 of 3, unfinished"
    assert pcl["top-1 %"] == f"{epochs_of(runs / 'pcl-0')[-1]['val']['mean_teacher1']['top1']:.2f}"


def epochs_of_whole(run: Path) -> list[Record]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_without_any_epoch_there_is_still_a_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "pcl-0" / "metrics.jsonl").unlink()
    assert report(runs / "pcl-0") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"unfinished: {runs}/pcl-0: 0 of 3 epochs",
        f"{runs}/pcl-0/report.html: 1 run; its pictures beside it",
    ]
    page = Page(runs / "pcl-0" / "report.html")
    assert page.rows("runs")[0]["last top-1 %"] == f"PCL {UNKNOWN}, PCL-E {UNKNOWN}"
    assert page.rows("results")[0]["epochs"] == "0 of 3, unfinished"


def test_names_are_text_and_never_markup(runs: Path) -> None:
    wild = runs / "<b>'&amp;\"<u onclick=x>"
    (runs / "vanilla").rename(wild)
    assert report(wild, "--out", runs) == 0
    page = Page(runs / "report.html")
    assert page.rows("runs")[0]["folder"] == str(wild)
    assert page.outside == []


def test_where_the_report_goes(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(runs / "vanilla", runs / "vanilla" / ".." / "vanilla", runs / "dml") == 0
    assert len(Page(tmp_path / "report" / "report.html").rows("runs")) == 2, "each run once"
    assert report("runs/vanilla") == 0
    assert {path.name for path in (runs / "vanilla").glob("report*")} == {
        "report.html",
        "report-curves.png",
        "report-calibration.png",
    }


def test_a_full_disk_leaves_the_report_before_as_it_was(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert report(runs / "vanilla", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with files_limited_to(20_000):
        assert report(runs, "--out", out) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "text"), [(2, "}{\n"), (1, "5\n"), (3, '{"kind": "epoch"}\n'), (1, "\xff\xfe\n")]
)
def test_a_damaged_line_is_named(
    runs: Path, line: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "dml" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = text.encode("latin-1")
    path.write_bytes(b"".join(lines))
    said = refusal(capsys, 3, runs)
    assert f"{path}: line {line} is damaged" in said
    assert not (runs / "report.html").exists()


def test_what_is_no_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}/none: no run here" in refusal(capsys, 2, tmp_path / "none")
    assert "no run given" in refusal(capsys, 2)
    (runs / "dml" / "config.json").unlink()
    assert f"{runs}/dml: no run here" in refusal(capsys, 2, runs / "dml")
    (runs / "pcl-0" / "config.json").write_text("{")
    assert f"{runs}/pcl-0/config.json: cannot be read" in refusal(capsys, 2, runs)
    rewrite_config(runs / "pcl-1", ("method",), "mean")
    assert f"{runs}/pcl-1/config.json: --method mean: unknown" in refusal(capsys, 2, runs / "pcl-1")
