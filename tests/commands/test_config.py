"""`pcl-fast config`: what it says of a run on several ranks."""

import re

import pytest

from pcl_fast import cli


def row_of(name: str, text: str) -> str:
    """A row of the table, its spaces made single."""
    found = re.search(rf"^\W*{name}\W+(.*?)\W*$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize(
    ("words", "batch", "rate"),
    [
        (
            ["imagenet-r18-node", "--ranks", "8"],
            "8 ranks x 128 = 1,024 images x 3 views",
            "0.4 = 0.1 x 1,024 / 256, after 5 epochs of warm-up, x0.1 at epochs 30, 60",
        ),
        (
            ["imagenet-r18", "--optim.warmup-epochs", "0.5"],
            "256 images x 3 views",
            "0.1, after 0.5 epochs of warm-up, x0.1 at epochs 30, 60",
        ),
        (
            ["cifar10-resnet32-vanilla", "--ranks", "2"],
            "2 ranks x 128 = 256 images x 1 views",
            "0.1, not scaled to the global batch (--optim.lr-batch), x0.1 at epochs 150, 225",
        ),
    ],
    ids=["node", "one", "cifar"],
)
def test_batch_and_rate_are_said_with_what_they_come_from(
    words: list[str],
    batch: str,
    rate: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["config", *words, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert row_of("global batch", said) == batch
    assert row_of("learning rate", said) == rate
