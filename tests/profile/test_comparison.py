"""Variants measured against each other, with the real loaders and steps, at the smallest size."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.errors import DataError
from pcl_fast.profile.comparison import Plan, Row, Source, compare, fastest_of_ours
from pcl_fast.profile.timing import Timing
from pcl_fast.profile.variants import variant_config
from tests import tiny

NAMES = ["baseline", "captured", "eager"]


def plan(**changes: Any) -> Plan:
    options: dict[str, Any] = {"repeats": 2, "steps": 2, "warmup": 1}
    return Plan(**(options | changes))


def sources(config: Any, names: list[str], ahead: int = 0) -> dict[str, Source]:
    return {name: Source(tiny.tiny_data(variant_config(name, config)).train, ahead) for name in names}


def test_each_is_measured_alone_with_its_data_and_both(tmp_path: Path) -> None:
    config, said = tiny.tiny_config(), list[str]()
    trace = tmp_path / "trace.json"
    rows = compare(config, NAMES, sources(config, NAMES), plan(trace=trace), said.append)
    assert [row.name for row in rows] == NAMES
    baseline, captured, eager = rows
    assert captured.refused == "cpu has no CUDA graphs"
    assert (captured.compute, captured.data, captured.end_to_end, captured.step) == (None,) * 4
    assert sum("captured is left out" in line for line in said) == 1
    for row in (baseline, eager):
        for timing in (row.compute, row.data, row.end_to_end):
            assert timing is not None
            assert len(timing.seconds) == timing.steps == 2
            assert all(0 < seconds < 10 for seconds in timing.seconds)
        assert row.step is row.end_to_end
        assert row.rates is not None
        assert row.data is not None
        assert row.rates.data == tiny.BATCH / row.data.median
        assert row.counts is not None
        assert row.counts.launches > 100
        assert row.warmup is not None
        assert row.memory is not None
        assert 1 << 20 < row.memory < 1 << 30
    assert baseline.compute is not None
    assert eager.compute is not None
    assert baseline.compute.ratio == 1
    assert eager.counts is not None
    assert baseline.counts is not None
    assert eager.counts.launches < baseline.counts.launches
    assert fastest_of_ours(rows) is eager
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("conv" in str(name) for name in names)


def test_without_data_only_computing_is_measured() -> None:
    rows = compare(tiny.tiny_config(), ["eager"], {}, plan(steps=None), lambda _: None)
    assert rows[0].step is rows[0].compute
    assert rows[0].compute is not None
    assert rows[0].compute.steps > 2, "a step takes some milliseconds, a sample less than half a second"
    assert rows[0].counts is not None
    assert rows[0].rates is None
    assert rows[0].end_to_end is rows[0].data is None


class Slow:
    """A loader that takes a while for each batch, and counts them."""

    def __init__(self, loader: Any, seconds: float) -> None:
        self.loader, self.seconds, self.made = loader, seconds, 0
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Any:
        for batch in self.loader.epoch(epoch, first_step):
            time.sleep(self.seconds)
            self.made += 1
            yield batch


def test_slow_data_bind_and_what_is_made_ahead_leads() -> None:
    """Two samples of two steps; before each, the three batches that might have been made ahead, and one."""
    config, seconds = tiny.tiny_config(), 0.1
    loader = Slow(tiny.tiny_data(config).train, seconds)
    row = compare(config, ["eager"], {"eager": Source(loader, ahead=3)}, plan(), lambda _: None)[0]
    assert row.rates is not None
    assert row.rates.data <= tiny.BATCH / seconds
    assert row.rates.end_to_end < tiny.BATCH / seconds
    data = 1 + 2 * 3 + 2 * (3 + 2)
    training = 1 + 2 * (4 + 2) + 2  # and two steps counted
    assert loader.made == data + training


def test_data_that_break_are_an_error_and_everything_is_closed() -> None:
    config = tiny.tiny_config()
    loader = tiny.Damaging(tiny.tiny_data(config).train, epoch_number=0, step=1, view=0)
    with pytest.raises(DataError, match="not finite"):
        compare(config, ["eager"], {"eager": Source(loader)}, plan(), lambda _: None)


def test_one_whose_loss_breaks_is_left_out_after_all() -> None:
    config = tiny.tiny_config()
    damaged = tiny.Damaging(tiny.tiny_data(config).train, epoch_number=0, step=3, view=0)
    broken = sources(config, ["baseline"]) | {"eager": Source(damaged)}
    baseline, eager = compare(config, ["baseline", "eager"], broken, plan(), lambda _: None)
    assert baseline.refused is None
    assert eager.refused is not None
    assert eager.refused.startswith("step 3: not finite")
    assert eager.step is eager.rates is None
    assert fastest_of_ours([baseline, eager]) is None


def test_the_fastest_of_ours() -> None:
    def row(name: str, seconds: float, refused: str | None = None) -> Row:
        timing = Timing([seconds], 1, 1.0, (1.0, 1.0))
        return Row(name=name, about="", batch_size=1, compute=timing, refused=refused)

    rows = [row("baseline", 0.1), row("eager", 2.0), row("captured", 1.0), row("compiled", 0.5, "broken")]
    assert fastest_of_ours(rows) is rows[2]
    assert fastest_of_ours(rows[:1]) is None
