"""BatchNorm of each rank's own batch, as it is by default: what ranks then have in common.

The oracles are torch's DistributedDataParallel with torch's SGD, and each rank's network by itself.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pcl_fast.build import build_network, build_state
from pcl_fast.config import Config
from pcl_fast.contract import ViewBatch
from pcl_fast.dist import World, joined
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.objectives import make_objective
from pcl_fast.step.train_step import Moment, train_step
from tests.dist.parts import CPU, Precise, config_of, data_of, digest
from tests.dist.ranks import run_ranks

STEPS, LR = 12, 0.05


def batches(config: Config, world: World, count: int = 96) -> list[ViewBatch]:
    """A rank's share of an epoch's steps, in float64."""
    return list(Precise(data_of(config, world.rank, count, drop_last=False).train).epoch(0))


def fresh(config: Config) -> PeerNetwork:
    """The network that a state begins with."""
    return build_network(config, make_objective(config)).double().train()


def beside_ddp() -> dict[str, Any]:
    """Vanilla training by our step, and by torch's wrapper and optimizer; the first gradients of both."""
    with joined(CPU, 60) as world:
        config = config_of(world.size, method="vanilla")
        state = build_state(config, torch.float64, world=world)
        theirs = DistributedDataParallel(fresh(config), broadcast_buffers=False)
        optimizer = torch.optim.SGD(
            theirs.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        gradients: list[list[Tensor]] = []
        own = batches(config, world)
        for step, batch in enumerate(own, 1):
            train_step(state, batch, Moment(step, LR, 0.0, 0.0))
            optimizer.zero_grad()
            F.cross_entropy(theirs(batch.views_VBCHW).logits_VBC[0], batch.labels_B).backward()
            if step == 1:
                gradients = [_gradients(state.network), _gradients(theirs.module)]
            optimizer.step()
        weights = [[w.detach().clone() for w in n.parameters()] for n in (state.network, theirs.module)]
        return {"steps": len(own), "gradients": gradients, "weights": weights}


def _gradients(network: torch.nn.Module) -> list[Tensor]:
    return [weight.grad.clone() for weight in network.parameters() if weight.grad is not None]


def test_a_step_is_that_of_distributed_data_parallel(tmp_path: Path) -> None:
    """Its gradients, and where twelve of them with momentum and weight decay lead."""
    for rank in run_ranks(tmp_path, 2, beside_ddp):
        assert rank["steps"] == STEPS
        for what in ("gradients", "weights"):
            ours, theirs = rank[what]
            assert len(ours) == len(theirs) > 20
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def statistics(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers()}


def train_locally() -> dict[str, Any]:
    """PCL, with five and four images in the last step; and what each rank's forward alone makes of each."""
    with joined(CPU, 60) as world:
        config = config_of(world.size, pcl={"num_peers": 3}, train={"batch_size": 5})
        state = build_state(config, torch.float64, world=world)
        assert state.mean_teacher is not None
        networks = {"student": state.network, "teacher": state.mean_teacher.network}
        rows: list[dict[str, Any]] = []
        for step, batch in enumerate(batches(config, world, 29), 1):
            own = {name: _after_forward(fresh(config), network, batch) for name, network in networks.items()}
            train_step(state, batch, Moment(step, LR, 0.5, min(1 - 1 / step, 0.7)))
            found = {name: statistics(network) for name, network in networks.items()}
            rows.append({"images": len(batch.labels_B), "own": own, "found": found, "digest": digest(state)})
        return {"rows": rows}


def _after_forward(plain: PeerNetwork, network: PeerNetwork, batch: ViewBatch) -> dict[str, Tensor]:
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        plain(batch.views_VBCHW)
    return statistics(plain)


def test_running_statistics_are_the_mean_of_what_each_ranks_would_be(tmp_path: Path) -> None:
    """Over the images: of the last nine, one rank has five."""
    ranks = [found["rows"] for found in run_ranks(tmp_path, 2, train_locally)]
    assert [[row["images"] for row in rows] for rows in ranks] == [[5, 5, 4], [5, 5, 5]]
    for step in zip(*ranks, strict=True):
        assert step[0]["digest"] == step[1]["digest"], "the same bits on all ranks"
        images = [row["images"] for row in step]
        for network in ("student", "teacher"):
            parts = [row["own"][network] for row in step]
            for name, found in step[0]["found"][network].items():
                if not found.is_floating_point():
                    assert all(torch.equal(part[name], found) for part in parts)
                    continue
                mean = sum(n * part[name] for n, part in zip(images, parts, strict=True)) / sum(images)
                torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-14)
                assert not torch.allclose(parts[0][name], parts[1][name], rtol=1e-3), "ranks differ"
