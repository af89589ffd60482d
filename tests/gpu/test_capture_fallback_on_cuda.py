"""What no graph can hold is said in one line, and training goes on as it would have without capture."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.models.zoo import OURS, Backbone
from pcl_fast.step.capture import WARMUP, CapturedCalls
from tests.gpu.captured import BATCH, DEVICE, ONE_GRAPH, REFUSED, assert_same, config_of, graphs, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device(DEVICE)


class Reads(nn.Module):
    """Scales by a number that the host has read."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.01 * x.detach().mean().item())


class Masks(nn.Module):
    """Scales by the mean of as many values as are positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.01 * x.detach()[x.detach() > 0].mean())


class Fetches(nn.Module):
    """Adds a tensor that lies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.full((1,), 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.to(x.device)


class Makes(nn.Module):
    """Adds a tensor made of a number of the host's, in a way that is only seen when it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor(0.25, device=x.device)


class ReadsSmall(nn.Module):
    """Reads a number, but of a small batch only."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] % BATCH == 0 else x * (1 + 0.01 * x.detach().mean().item())


def network_with(layer: Callable[[], nn.Module]) -> Backbone:
    """A small network with the layer in its trunk."""

    def build(num_classes: int) -> nn.Module:
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)]
        body = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), layer(), *body, *head)

    return Backbone("with_layer", build, "4", 32, "cifar")


@pytest.mark.parametrize("host_fed", [False, True], ids=["resident", "host-fed"])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Reads, "aten._local_scalar_dense reads a number from the device, at "),
        (Masks, "aten.index picks by a mask, of as many elements as that has true values, at "),
        (Fetches, "aten._to_copy copies between cpu and cuda, at "),
        (Makes, ""),
    ],
)
def test_it_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: Any, reason: str, host_fed: bool
) -> None:
    monkeypatch.setitem(OURS, "with_layer", network_with(layer))
    for capture in ("on", "off"):
        said = run(tmp_path / capture, config_of(capture, model="with_layer"), host_fed=host_fed)
        if capture == "off":
            assert said == []
            continue
        (message,) = said
        assert message.startswith(REFUSED + reason)
        assert message.endswith("); it goes on eager")
        assert "\n" not in message
        if reason:
            assert f", at {Path(__file__).name}:" in message
    assert_same(tmp_path / "on", tmp_path / "off")


def test_a_size_that_cannot_be_captured_leaves_the_graph_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OURS, "with_layer", network_with(ReadsSmall))
    said: list[str] = []
    for capture in ("on", "off"):
        config = config_of(capture, model="with_layer", epochs=5)
        said += run(tmp_path / capture, config, 4 * BATCH + 5, drop_last=False)
    first, second = said
    assert first.startswith(ONE_GRAPH)
    assert second.startswith(REFUSED)
    assert_same(tmp_path / "on", tmp_path / "off")


@pytest.fixture
def said() -> list[str]:
    return []


def test_every_call_is_made_once(said: list[str]) -> None:
    """Plain, watched, captured or replayed; alone and in pairs."""
    counts = torch.zeros(2, dtype=torch.int64, device=CUDA)
    made = [0, 0]

    def call(which: int) -> Callable[[], None]:
        def count() -> None:
            made[which] += 1
            counts[which] += 1

        return count

    calls = CapturedCalls(CUDA, said.append)
    for _ in range(10):
        calls.run([call(0)], "one")
        calls.run([call(0), call(1)], "both")
    assert counts.tolist() == [20, 10]
    assert made == [2 * (WARMUP + 1), WARMUP + 1], "replays do not come back to the host"
    assert graphs(said) == 2
    calls.close()


def test_an_error_before_the_capture_comes_through(said: list[str]) -> None:
    calls = CapturedCalls(CUDA, said.append)
    with pytest.raises(IndexError):
        calls.run([[].pop], "key")
    assert said == []


def test_a_capture_that_breaks_changes_nothing(said: list[str]) -> None:
    """Neither the numbers, nor the stream that later work goes to, nor what torch's allocator believes."""
    counts = torch.zeros(1, device=CUDA)

    def call() -> None:
        counts.add_(torch.ones(1000, 1000, device=CUDA).mean())
        if torch.cuda.is_current_stream_capturing():
            raise NotImplementedError("this network asks whether it is captured\nand minds")

    calls, before = CapturedCalls(CUDA, said.append), torch.cuda.current_stream()
    for _ in range(10):
        calls.run([call], "key")
    assert counts.item() == 10
    assert torch.cuda.current_stream() == before
    assert said == [f"{REFUSED}this network asks whether it is captured); it goes on eager"]
    calls.run([call], "another")
    calls.close()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts.add_(1)
    graph.replay()
    assert counts.item() == 12


def test_one_of_two_that_breaks_on_its_own_stream_changes_nothing_either(said: list[str]) -> None:
    counts = torch.zeros(2, device=CUDA)

    def bad() -> None:
        counts[0] += 1
        if torch.cuda.is_current_stream_capturing():
            raise NotImplementedError("not here")

    def good() -> None:
        counts[1] += 1

    calls = CapturedCalls(CUDA, said.append)
    for _ in range(8):
        calls.run([bad, good], "key")
    assert counts.tolist() == [8, 8]
    assert said == [f"{REFUSED}not here); it goes on eager"]
    calls.close()


def test_closing_frees_what_the_graphs_held(said: list[str]) -> None:
    total = torch.zeros((), device=CUDA)

    def call() -> None:
        total.add_(torch.ones(1 << 26, device=CUDA).mul_(2).mean())  # 256 MiB

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    calls = CapturedCalls(CUDA, said.append)
    for _ in range(6):
        calls.run([call], "key")
    assert total.item() == 12
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - before
    assert held >= 256 * 2**20, "a graph holds its memory"
    told = int(said[0].rpartition("s, ")[2].removesuffix(" MiB"))
    assert 256 <= told <= held // 2**20
    calls.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= 2**25


def test_a_run_that_has_ended_leaves_no_memory_behind(tmp_path: Path) -> None:
    """A first run makes what libraries keep; later ones add nothing to it."""
    held: list[int] = []
    for number in range(3):
        run(tmp_path / str(number), config_of(dtype="bfloat16", epochs=2))
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that was ever used
        held.append(torch.cuda.memory_allocated())
    assert max(held[1:]) <= held[0] + 2**20
