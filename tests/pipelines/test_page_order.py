"""The order of a file read window by window: a permutation, within its memory bound, and well shuffled."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipelines.order import epoch_order, page_order
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
PAGES, PER_PAGE, WINDOW = 100, 20, 25
SAMPLES, WINDOW_SAMPLES = PAGES * PER_PAGE, WINDOW * PER_PAGE
# As in a real file, the numbers of pages do not begin at 0 and have gaps.
PAGE_OF_N = np.repeat(3 + 2 * np.arange(PAGES), PER_PAGE)


@pytest.mark.parametrize("window", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("sizes", [[1], [5], [3, 1, 4, 1, 5], [9] * 11, list(range(1, 30))])
def test_is_a_permutation(sizes: list[int], window: int) -> None:
    page_of_N = np.repeat(np.arange(len(sizes)), sizes)
    order = page_order(page_of_N, window, seed=3, epoch=5)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(sum(sizes)))


def test_a_window_of_all_pages_is_the_plain_shuffle() -> None:
    assert torch.equal(page_order(PAGE_OF_N, PAGES, 7, 2), epoch_order(SAMPLES, 7, 2, CPU))


def test_each_page_is_read_in_one_window_and_the_memory_bound_holds() -> None:
    page = torch.from_numpy(PAGE_OF_N)[page_order(PAGE_OF_N, WINDOW, 1, 2)]
    windows = [set(part.tolist()) for part in page.split(WINDOW_SAMPLES)]
    assert [len(window) for window in windows] == [WINDOW] * (PAGES // WINDOW)
    assert len(set.union(*windows)) == PAGES, "no page is in two windows"
    for begin in range(0, SAMPLES - WINDOW_SAMPLES, 17):
        assert len(page[begin : begin + WINDOW_SAMPLES].unique()) <= 2 * WINDOW


def test_pages_and_samples_are_drawn_anew_for_each_seed_and_epoch() -> None:
    first = page_order(PAGE_OF_N, WINDOW, 1, 2)
    assert torch.equal(first, page_order(PAGE_OF_N, WINDOW, 1, 2))
    window = set(PAGE_OF_N[first[:WINDOW_SAMPLES].numpy()])
    for seed, epoch in ((1, 3), (2, 2)):
        other = page_order(PAGE_OF_N, WINDOW, seed, epoch)
        assert (first == other).sum() < 10  # of 2000, one is expected to stay
        shared = window & set(PAGE_OF_N[other[:WINDOW_SAMPLES].numpy()])
        assert abs(len(shared) - WINDOW * WINDOW / PAGES) < 10  # 6.25 expected, deviation 1.9


def test_pages_are_not_drawn_with_the_numbers_of_samples() -> None:
    single = np.arange(50)  # a sample a page: windows of one page show the order of the pages alone
    assert not torch.equal(page_order(single, 1, 3, 4), epoch_order(50, 3, 4, CPU))


def test_shuffles_as_well_as_a_plain_shuffle_within_its_window() -> None:
    orders = torch.stack([page_order(PAGE_OF_N, WINDOW, 0, epoch) for epoch in range(20)])
    displacement = (orders - torch.arange(SAMPLES)).abs().double().mean()
    assert displacement / SAMPLES == pytest.approx(1 / 3, abs=0.02), "samples move all over the epoch"
    # Sample i is followed by i + 1 with probability 1 / WINDOW_SAMPLES if both are in one window.
    same_page, same_window = PAGES * (PER_PAGE - 1), (PAGES - 1) * (WINDOW - 1) / (PAGES - 1)
    expected = 20 * (same_page + same_window) / WINDOW_SAMPLES
    assert abs(int((orders.diff() == 1).sum()) - expected) < 5 * math.sqrt(expected)


def test_batches_of_a_file_sorted_by_class_hold_many_classes() -> None:
    class_of_N = torch.arange(SAMPLES) // 40  # 50 classes of two pages each, as converters write them

    def classes_in_a_batch(order: torch.Tensor) -> float:
        batches = class_of_N[order].split(32)
        return sum(len(batch.unique()) for batch in batches) / len(batches)

    plain = classes_in_a_batch(epoch_order(SAMPLES, 0, 0, CPU))
    assert plain == pytest.approx(50 * (1 - 0.98**32), abs=1.5)
    paged = [classes_in_a_batch(page_order(PAGE_OF_N, WINDOW, 0, epoch)) for epoch in range(5)]
    assert min(paged) > 0.6 * plain
    assert max(paged) < plain


def test_another_process_gives_the_same_order() -> None:
    program = (
        "import numpy as np; from pipelines.order import page_order\n"
        f"print(page_order(np.repeat(3 + 2 * np.arange({PAGES}), {PER_PAGE}), {WINDOW}, 5, 6).tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert told.stdout.strip() == str(page_order(PAGE_OF_N, WINDOW, 5, 6).tolist())
