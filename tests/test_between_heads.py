"""What is measured between heads, against loops over images in float64 and against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pcl_fast.between_heads import between_heads, pair_sums

HEADS, IMAGES, CLASSES = 4, 57, 11


def measured(logits_HBC: Tensor) -> dict[str, np.ndarray]:
    sums = pair_sums(logits_HBC.log_softmax(-1), logits_HBC.argmax(-1)).tolist()
    found = between_heads([str(n) for n in range(len(logits_HBC))], sums, logits_HBC.shape[1])
    return {name: np.array(getattr(found, name)) for name in ("agreement", "kl", "distance")}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_loop(logits_HBC: np.ndarray) -> dict[str, np.ndarray]:
    heads, images, _ = logits_HBC.shape
    found = {name: np.zeros((heads, heads)) for name in ("agreement", "kl", "distance")}
    for image in range(images):
        for i in range(heads):
            for j in range(heads):
                p, q = softmax(logits_HBC[i, image]), softmax(logits_HBC[j, image])
                found["agreement"][i, j] += float(p.argmax() == q.argmax()) / images
                found["kl"][i, j] += sum(p * np.log(p / q)) / images
                found["distance"][i, j] += math.sqrt(sum((p - q) ** 2)) / images
    return found


def test_every_pair_equals_a_loop_over_images() -> None:
    logits_HBC = 2 * torch.randn(HEADS, IMAGES, CLASSES)
    found, expected = measured(logits_HBC), by_loop(logits_HBC.double().numpy())
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix, expected[name], rtol=1e-5, atol=1e-12, err_msg=name)
    assert (found["kl"] != found["kl"].T).any(), "KL has a direction"
    off = ~np.eye(HEADS, dtype=bool)
    assert ((found["agreement"] > 0) & (found["agreement"] < 1))[off].all()


def test_small_differences_are_not_lost_in_rounding() -> None:
    logits_HBC = torch.randn(1, IMAGES, CLASSES, dtype=torch.float64).expand(2, -1, -1).clone()
    logits_HBC[1] += 1e-5 * torch.randn(IMAGES, CLASSES, dtype=torch.float64)
    found, expected = measured(logits_HBC), by_loop(logits_HBC.numpy())
    assert 0 < expected["kl"][0, 1] < 1e-9
    for name in ("kl", "distance"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-15)


def test_two_coins() -> None:
    """Two classes: p = (1/2, 1/2), q = (a, 1 - a)."""
    share = 0.9
    logits_HBC = torch.tensor([[[0.0, -0.0]], [[math.log(share / (1 - share)), 0.0]]], dtype=torch.float64)
    found = measured(logits_HBC)
    assert found["kl"][0, 1] == pytest.approx(-math.log(2 * math.sqrt(share * (1 - share))))
    assert found["kl"][1, 0] == pytest.approx(
        math.log(2) + share * math.log(share) + (1 - share) * math.log(1 - share)
    )
    assert found["distance"][0, 1] == found["distance"][1, 0] == pytest.approx(math.sqrt(2) * (share - 0.5))


def test_heads_that_say_the_same_and_heads_that_contradict_each_other() -> None:
    sure_BC = 1000.0 * torch.nn.functional.one_hot(torch.arange(6), 6)
    found = measured(torch.stack([sure_BC, sure_BC, sure_BC.roll(1, 0)]))
    assert found["agreement"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert found["kl"].tolist() == [[0, 0, 1000], [0, 0, 1000], [1000, 1000, 0]]
    assert found["distance"][0].tolist() == pytest.approx([0, 0, math.sqrt(2)])


def test_ready_for_json_it_is_short() -> None:
    sums = [[[3.0, 1.0], [1.0, 3.0]], [[0.0, 1e-7 / 3], [2.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]
    assert between_heads(("a", "b"), sums, 3).as_dict() == {
        "heads": ["a", "b"],
        "agreement": [[1.0, 0.33333], [0.33333, 1.0]],
        "kl": [[0.0, 1.1111e-08], [0.66667, 0.0]],
        "distance": [[0.0, 0.33333], [0.33333, 0.0]],
    }
