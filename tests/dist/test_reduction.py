"""What a step adds up over ranks: how exact sums are, and what is not finite on one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.dist import joined
from pcl_fast.errors import DivergedError
from pcl_fast.step.reduction import Reduction
from tests.dist.parts import CPU, config_of, data_of, tensors_of
from tests.dist.ranks import run_ranks
from tests.dist.runs import Onlooker, train_here
from tests.tiny import Damaging, newest_checkpoint

SIZE, IMAGES = 10_000, (5, 2, 0)  # of three ranks, one of which has none


def part_of(rank: int) -> Tensor:
    """A rank's gradients, of very different sizes."""
    draws = torch.Generator().manual_seed(rank)
    return torch.randn(SIZE, generator=draws) * torch.exp(4 * torch.randn(SIZE, generator=draws))


def norm_of(rank: int) -> nn.BatchNorm2d:
    """A norm whose running statistics are this rank's own."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean = torch.arange(3.0) * 10**rank
    norm.running_var = torch.full((3,), rank + 1.0)
    return norm


def reduce_once(dtype: torch.dtype) -> dict[str, Any]:
    with joined(CPU, 60) as world:
        gradients, norm = part_of(world.rank), norm_of(world.rank)
        reduction = Reduction(world, gradients, [norm], 3, dtype)
        odd = {0: 1.0, 1: float("nan"), 2: float("-inf")}[world.rank]
        watched = [torch.tensor([2.0, odd]), torch.tensor(1.0)]
        found = reduction(IMAGES[world.rank], watched)
        return {"gradients": gradients, "norm": norm.state_dict(), "findings": found.clone()}


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)], ids=str)
def test_gradients_are_as_exact_as_what_they_travel_in(
    tmp_path: Path, dtype: torch.dtype, unit: float
) -> None:
    """Casting and two additions round; then division by the images, in float32, does."""
    ranks = run_ranks(tmp_path, 3, reduce_once, [dtype])
    parts = torch.stack([part_of(rank).double() for rank in range(3)])
    exact, size = parts.sum(0) / 7, parts.abs().sum(0) / 7
    error = (ranks[0]["gradients"].double() - exact).abs()
    assert (error <= 1.01 * (3 * unit + 2.0**-24) * size).all()
    assert (error > unit / 8 * size).any(), "in no more than it was asked for"
    for rank in ranks[1:]:
        assert torch.equal(rank["gradients"], ranks[0]["gradients"])


def test_statistics_are_means_over_images_and_findings_are_each_ranks(tmp_path: Path) -> None:
    for rank in run_ranks(tmp_path, 3, reduce_once, [torch.float32]):
        norm = rank["norm"]
        torch.testing.assert_close(norm["running_mean"], torch.arange(3.0) * (5 + 2 * 10) / 7)
        torch.testing.assert_close(norm["running_var"], torch.full((3,), (5 * 1 + 2 * 2) / 7))
        assert norm["num_batches_tracked"] == 0
        wrong = rank["findings"].view(3, 3).isnan().tolist()
        assert wrong == [[False, False, False], [False, True, False], [False, True, False]]
        assert not rank["findings"].nan_to_num(0).any()


def diverge(folder: Path, value: float, reduce_dtype: str) -> dict[str, Any]:
    """On the second rank an image of the second peer's view is damaged, in the sixth step."""
    with joined(CPU, 60) as world:
        config = config_of(world.size, dist={"reduce_dtype": reduce_dtype}, train={"save_steps": 1})
        data = data_of(config, world.rank)
        if world.rank == 1:
            damaging = Damaging(data.train, epoch_number=1, step=2, view=1, value=value)
            data = replace(data, train=damaging)
        kept: list[dict[str, Tensor]] = []
        onlooker = Onlooker(lambda trainer: kept.append(tensors_of(trainer.state)))
        error = None
        try:
            train_here(folder, config, world, data, [onlooker])
        except DivergedError as met:
            error = met
        assert error is not None
        assert onlooker.trainer is not None
        after = tensors_of(onlooker.trainer.state)
        return {"steps": onlooker.steps, "error": error, "before": kept[-1], "after": after}


WRONG = "ce/peer2", "ce/ensemble", "pe/peer1", "pe/peer2", "pm/peer1", "pm/peer2", "gradient norm"


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "float32"), (float("inf"), "bfloat16")], ids=["nan", "inf"]
)
def test_what_is_not_finite_on_one_rank_stops_all_before_the_update(
    tmp_path: Path, value: float, dtype: str
) -> None:
    """They name step, rank, peer and term; the first peer's cross-entropy and the other rank are in order."""
    ranks = run_ranks(tmp_path / "ranks", 2, diverge, [tmp_path / "run", value, dtype])
    wrong = ", ".join(f"{name} on rank 1" for name in WRONG)
    for rank, found in enumerate(ranks):
        message = str(found["error"])
        assert message.startswith(
            f"step 6: not finite: {wrong}, norm of all gradients; the weights are those"
        )
        assert message.endswith("step-00000005.pt")
        assert found["error"].told_elsewhere == (rank == 1)
        assert found["steps"] == [1, 2, 3, 4, 5]
        for name, tensor in found["before"].items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(found["after"][name], tensor), name
                assert tensor.isfinite().all()
    last = newest_checkpoint(tmp_path / "run")
    assert last["progress"]["steps_done"] == 5
    for name, tensor in last["state"]["network"].items():
        assert torch.equal(tensor, ranks[1]["before"][f"network/{name}"]), "and what is kept is whole"
