"""The bar chart: what can be measured in its pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from pcl_fast.profile.chart import draw_rates

BLUE, RED = (31, 119, 180), (214, 39, 40)
RATES = {"baseline": [90.0, 100.0, 120.0], "compiled": [200.0], "captured": [380.0, 400.0, 410.0, 405.0]}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture - colour).max(-1) < 40).astype(int)


def bars(picture: np.ndarray) -> list[int]:
    """The longest run of blue in each bar, from the top, in pixels."""
    widths = near(picture, BLUE).sum(1)
    edges = np.flatnonzero(np.diff((widths > 20).astype(int)))
    return [int(np.median(widths[first:last])) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def test_bars_are_as_long_as_the_medians(tmp_path: Path) -> None:
    draw_rates(tmp_path / "a.png", RATES, "ResNet-32")
    found = bars(pixels(tmp_path / "a.png"))
    assert len(found) == 3, "in the order given"
    np.testing.assert_allclose(np.array(found) / found[2], [100 / 402.5, 200 / 402.5, 1], atol=0.02)
    assert near(pixels(tmp_path / "a.png"), RED).sum() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_floor_is_a_line_where_it_belongs(tmp_path: Path) -> None:
    draw_rates(tmp_path / "a.png", RATES, "ResNet-32", floor=805.0)
    picture = pixels(tmp_path / "a.png")
    red = near(picture, RED).sum(0)
    line = int(red.argmax())
    assert red[line] > 0.3 * picture.shape[0]
    blue = near(picture, BLUE).sum(0).nonzero()[0]
    longest = np.sort(blue)[-1] - blue[0]
    assert abs((line - blue[0]) / longest - 2) < 0.05, "twice as far as the bar of 402.5"


def test_another_spread_is_another_picture_and_a_lower_floor_can_be_drawn(tmp_path: Path) -> None:
    draw_rates(tmp_path / "a.png", {"ours": [100.0, 100.0, 100.0]}, "t")
    draw_rates(tmp_path / "b.png", {"ours": [60.0, 100.0, 140.0]}, "t")
    draw_rates(tmp_path / "c.png", {"ours": [100.0]}, "t", floor=50.0)
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert (np.abs(a - b).max(-1) > 40).sum() > 20
    assert near(c, RED).sum() > 20
