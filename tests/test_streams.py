"""Work side by side gives what the same work gives in turn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.streams import Fork

CPU = torch.device("cpu")


def test_a_cpu_does_one_task_after_the_other_and_returns_their_results_in_order() -> None:
    done: list[int] = []

    def task(number: int) -> Callable[[], int]:
        return lambda: done.append(number) or number * number

    fork = Fork(CPU, 2)
    assert fork([task(number) for number in range(5)]) == [0, 1, 4, 9, 16]
    assert done == list(range(5))
    assert fork([]) == []


def test_an_error_of_a_task_comes_through() -> None:
    with pytest.raises(IndexError):
        Fork(CPU, 1)([lambda: 1, [].pop])


@pytest.mark.gpu
class TestOnCuda:
    """Streams of a real device."""

    def layers(self, count: int) -> list[nn.Sequential]:
        return [nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))).cuda() for _ in range(count)]

    def run(self, fork: Fork | None, layers: list[nn.Sequential], x: Tensor) -> list[Tensor]:
        """Outputs, and the gradients of the input and of all weights, after work that must come first."""
        leaf = x.clone().requires_grad_()
        before = leaf
        for _ in range(20):  # long enough that a stream that does not wait would read too early
            before = before @ torch.eye(512, device="cuda")
        tasks = [lambda layer=layer: layer(before).relu() for layer in layers]
        results = [task() for task in tasks] if fork is None else fork(tasks)
        total = torch.stack(results).sum(0)
        weights = [weight for layer in layers for weight in layer.parameters()]
        return [*results, *torch.autograd.grad(total.square().mean(), [leaf, *weights])]

    @pytest.mark.parametrize("tasks", [1, 2, 3, 8])
    def test_results_and_gradients_are_those_in_turn(self, tasks: int) -> None:
        layers, fork = self.layers(tasks), Fork(torch.device("cuda"), tasks - 1)
        for _ in range(10):
            x = torch.randn(1024, 512, device="cuda")
            found, expected = self.run(fork, layers, x), self.run(None, layers, x)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_memory_freed_by_a_task_is_not_written_to_while_it_is_read(self) -> None:
        """Many forks one after the other, whose blocks the allocator gives out again at once."""
        fork = Fork(torch.device("cuda"), 2)
        x = torch.randn(1 << 20, device="cuda")
        expected = [(x * k).cumsum(0).sum() for k in (1.0, 2.0, 3.0)]
        for _ in range(200):
            results = fork([lambda k=k: (x * k).cumsum(0) for k in (1.0, 2.0, 3.0)])
            sums = [result.sum() for result in results]
            del results
            torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1.0)

    def test_the_calling_stream_waits_for_all(self) -> None:
        fork = Fork(torch.device("cuda"), 1)
        place = torch.zeros(1, device="cuda")

        def slowly() -> None:
            torch.cuda._sleep(200_000_000)
            place.fill_(7)

        fork([slowly, lambda: None])
        assert place.item() == 7

    def test_more_tasks_than_streams_are_refused(self) -> None:
        with pytest.raises(AssertionError, match="a stream for each task but the last"):
            Fork(torch.device("cuda"), 1)([lambda: 1] * 3)
