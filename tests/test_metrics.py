"""Accuracies and running means against numpy and against hand arithmetic."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from pcl_fast import metrics
from pcl_fast.contract import EvalBatch, PeerOutputs
from pcl_fast.metrics import RunningMeans, Tally, accuracies, compared, tally_heads

IMAGES, CLASSES, PEERS = 103, 12, 3


class TableLoader:
    """Batches of 16 and a last one of 7; an "image" carries its number, by which its logits are looked up."""

    num_samples = IMAGES

    def __init__(self, labels_N: Tensor) -> None:
        self.labels_N = labels_N

    def __iter__(self) -> Iterator[EvalBatch]:
        numbers_N = torch.arange(IMAGES, dtype=torch.float32)
        for begin in range(0, IMAGES, 16):
            numbers_B = numbers_N[begin : begin + 16]
            yield EvalBatch(numbers_B[:, None, None, None], self.labels_N[begin : begin + 16])


@pytest.fixture
def logits_HNC() -> Tensor:
    return 3 * torch.randn(PEERS + 1, IMAGES, CLASSES)


@pytest.fixture
def labels_N() -> Tensor:
    return torch.randint(CLASSES, (IMAGES,))


def count(logits_HNC: Tensor, labels_N: Tensor, ensemble: bool = True) -> Tally:
    def predict(views_VBCHW: Tensor) -> PeerOutputs:
        assert views_VBCHW.shape[0] == 1, "one view, shared by all peers"
        numbers_B = views_VBCHW[0, :, 0, 0, 0].long()
        heads_HBC = logits_HNC[:, numbers_B]
        return PeerOutputs(heads_HBC[:PEERS], (), heads_HBC[PEERS] if ensemble else None)

    return tally_heads({("peer", "ensemble"): predict}, TableLoader(labels_N))


def measure(logits_HNC: Tensor, labels_N: Tensor, ensemble: bool = True) -> dict[str, metrics.Accuracy]:
    return accuracies([count(logits_HNC, labels_N, ensemble)])


def by_numpy(logits_NC: Tensor, labels_N: Tensor) -> tuple[float, float, float]:
    """Top-1, top-5 and cross-entropy over all images at once, in float64."""
    scores, labels = logits_NC.numpy().astype(np.float64), labels_N.numpy()
    own = scores[np.arange(len(labels)), labels]
    rank = (scores > own[:, None]).sum(1)
    shifted = scores - scores.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) + scores.max(1) - own
    return 100 * (rank < 1).mean(), 100 * (rank < 5).mean(), losses.mean()


def test_every_head_equals_numpy_though_the_last_batch_is_short(logits_HNC: Tensor, labels_N: Tensor) -> None:
    heads = measure(logits_HNC, labels_N)
    assert list(heads) == ["peer1", "peer2", "peer3", "ensemble"]
    for head, logits_NC in zip(heads.values(), logits_HNC, strict=True):
        top1, top5, loss = by_numpy(logits_NC, labels_N)
        assert (head.top1, head.top5) == (pytest.approx(top1, rel=1e-15), pytest.approx(top5, rel=1e-15))
        assert head.loss == pytest.approx(loss, rel=1e-6)
        assert head.images == IMAGES
        assert 0 < head.top1 < head.top5 < 100


def test_without_an_ensemble_there_are_peers_only(logits_HNC: Tensor, labels_N: Tensor) -> None:
    heads = measure(logits_HNC, labels_N, ensemble=False)
    assert list(heads) == ["peer1", "peer2", "peer3"]
    assert heads["peer2"] == measure(logits_HNC, labels_N)["peer2"]


def test_several_networks_are_measured_in_one_pass(logits_HNC: Tensor, labels_N: Tensor) -> None:
    passes = 0

    class CountedLoader(TableLoader):
        def __iter__(self) -> Iterator[EvalBatch]:
            nonlocal passes
            passes += 1
            return super().__iter__()

    def predictor(table_HNC: Tensor) -> metrics.Predict:
        def predict(views_VBCHW: Tensor) -> PeerOutputs:
            heads_HBC = table_HNC[:, views_VBCHW[0, :, 0, 0, 0].long()]
            return PeerOutputs(heads_HBC[:PEERS], (), heads_HBC[PEERS])

        return predict

    networks = {
        ("peer", "ensemble"): predictor(logits_HNC),
        ("mean_teacher", "mean_ensemble"): predictor(-logits_HNC),
    }
    heads = accuracies([tally_heads(networks, CountedLoader(labels_N))])
    assert passes == 1
    assert list(heads)[PEERS:] == ["ensemble", *(f"mean_teacher{j}" for j in (1, 2, 3)), "mean_ensemble"]
    assert list(heads.values()) == [
        *measure(logits_HNC, labels_N).values(),
        *measure(-logits_HNC, labels_N).values(),
    ]


def test_confidence_and_pairs_are_measured_over_all_batches(logits_HNC: Tensor, labels_N: Tensor) -> None:
    tally = count(logits_HNC, labels_N)
    between = compared([tally])
    assert between is not None
    assert between.heads == ("peer1", "peer2", "peer3", "ensemble")
    logs_HNC = logits_HNC.double().log_softmax(-1)
    top_HN = logs_HNC.argmax(-1)
    for i, head in enumerate(accuracies([tally]).values()):
        confidence_N, hits_N = logs_HNC[i].exp().amax(-1), (top_HN[i] == labels_N).double()
        bins_N = (15 * confidence_N).ceil()
        gaps = [(confidence_N - hits_N)[bins_N == number].sum().abs().item() for number in range(1, 16)]
        assert head.ece == pytest.approx(100 * sum(gaps) / IMAGES, rel=1e-9)
        for j in range(PEERS + 1):
            assert between.agreement[i][j] == (top_HN[i] == top_HN[j]).double().mean()
            kl = torch.nn.functional.kl_div(logs_HNC[j], logs_HNC[i], log_target=True, reduction="batchmean")
            assert between.kl[i][j] == pytest.approx(kl.item(), rel=1e-9, abs=1e-14)
            distance = (logs_HNC[i].exp() - logs_HNC[j].exp()).norm(dim=-1).mean()
            assert between.distance[i][j] == pytest.approx(distance.item(), rel=1e-9, abs=1e-7)


def test_ranks_add_up_and_one_without_images_changes_nothing(logits_HNC: Tensor, labels_N: Tensor) -> None:
    class Part(TableLoader):
        def __init__(self, kept: slice) -> None:
            super().__init__(labels_N)
            self.kept = kept

        def __iter__(self) -> Iterator[EvalBatch]:
            yield from list(super().__iter__())[self.kept]

    def predict(views_VBCHW: Tensor) -> PeerOutputs:
        heads_HBC = logits_HNC[:, views_VBCHW[0, :, 0, 0, 0].long()]
        return PeerOutputs(heads_HBC[:PEERS], (), heads_HBC[PEERS])

    kept = (slice(0, 2), slice(0, 0), slice(2, None))
    ranks = [tally_heads({("peer", "ensemble"): predict}, Part(each)) for each in kept]
    assert [rank.images for rank in ranks] == [32, 0, 71]
    whole = count(logits_HNC, labels_N)
    for head, found in accuracies(ranks).items():
        expected = accuracies([whole])[head]
        assert (found.top1, found.top5, found.images) == (expected.top1, expected.top5, expected.images)
        assert (found.loss, found.ece) == pytest.approx((expected.loss, expected.ece), rel=1e-12)
    found, expected = compared(ranks), compared([whole])
    assert found is not None
    assert expected is not None
    assert found.as_dict() == expected.as_dict()


def test_a_head_alone_has_no_pairs(labels_N: Tensor) -> None:
    logits_NC = torch.randn(IMAGES, CLASSES)

    def predict(views_VBCHW: Tensor) -> PeerOutputs:
        numbers_B = views_VBCHW[0, :, 0, 0, 0].long()
        return PeerOutputs(logits_NC[None, numbers_B], (), None)

    tally = tally_heads({("peer", "ensemble"): predict}, TableLoader(labels_N))
    assert compared([tally]) is None
    assert list(accuracies([tally])) == ["peer1"]


def test_perfect_and_hopeless_predictions(labels_N: Tensor) -> None:
    perfect_NC = 100.0 * torch.nn.functional.one_hot(labels_N, CLASSES)
    heads = measure(torch.stack([perfect_NC, -perfect_NC, perfect_NC, -perfect_NC]), labels_N)
    assert (heads["peer1"].top1, heads["peer1"].top5) == (100.0, 100.0)
    assert (heads["peer2"].top1, heads["peer2"].top5) == (0.0, 0.0)
    assert heads["ensemble"].loss == pytest.approx(100 + np.log(CLASSES - 1), rel=1e-6)


def test_with_fewer_than_five_classes_top5_is_all_of_them() -> None:
    labels_N = torch.randint(3, (IMAGES,))
    heads = measure(torch.randn(PEERS + 1, IMAGES, 3), labels_N)
    assert all(head.top5 == 100.0 for head in heads.values())


def test_evaluation_can_be_stopped_before_any_batch(logits_HNC: Tensor, labels_N: Tensor) -> None:
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise InterruptedError

    seen: list[int] = []

    def predict(views_VBCHW: Tensor) -> PeerOutputs:
        seen.append(views_VBCHW.shape[1])
        return PeerOutputs(logits_HNC[:, :16], (), None)

    with pytest.raises(InterruptedError):
        tally_heads({("peer", "ensemble"): predict}, TableLoader(labels_N), stop)
    assert seen == [16, 16]


def test_running_means_weigh_batches_by_their_size() -> None:
    means = RunningMeans(2, torch.device("cpu"))
    means.sums.add_(torch.tensor([10.0, 1.0]))
    means.count(16)
    means.sums.add_(torch.tensor([2.0, 7.0]))
    means.count(4)
    assert means.means() == [12 / 20, 8 / 20]
    means.reset()
    assert means.means() == [0.0, 0.0]
    means.sums.add_(torch.tensor([3.0, 6.0]))
    means.count(3)
    assert means.means() == [1.0, 2.0]


def test_running_means_are_sums_in_double_precision() -> None:
    means = RunningMeans(1, torch.device("cpu"))
    means.sums.add_(torch.tensor([2.0**24]))
    means.count(1)
    for _ in range(3):
        means.sums.add_(torch.tensor([1.0]))  # would be lost in float32
        means.count(1)
    assert means.means() == [(2**24 + 3) / 4]


def test_saved_means_go_on_in_the_same_bits() -> None:
    values = torch.rand(10, 3)
    straight, first, second = (RunningMeans(3, torch.device("cpu")) for _ in range(3))
    for row in values:
        straight.sums.add_(row)
        straight.count(7)
    for row in values[:4]:
        first.sums.add_(row)
        first.count(7)
    saved = first.state_dict()
    first.sums.add_(values[0])
    first.count(7)  # what is saved does not follow
    second.load_state_dict(saved)
    for row in values[4:]:
        second.sums.add_(row)
        second.count(7)
    assert second.means() == straight.means()


def test_the_rate_counts_what_this_process_did_since_the_last_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    means = RunningMeans(1, torch.device("cpu"))
    means.sums.add_(torch.zeros(1))
    means.count(60)
    now += 3
    assert means.rate() == 20.0
    means.restart_clock()  # after an evaluation
    means.sums.add_(torch.zeros(1))
    means.count(60)
    now += 2
    assert means.rate() == 30.0
    resumed = RunningMeans(1, torch.device("cpu"))
    resumed.load_state_dict(means.state_dict())
    resumed.sums.add_(torch.zeros(1))
    resumed.count(8)
    now += 4
    assert resumed.rate() == 2.0
