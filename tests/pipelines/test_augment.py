"""The public way to views: it picks a kernel, and the result does not show which."""

import pytest
import torch

from pipelines.augment import make_views, random_boxes
from pipelines.boxes import draw_boxes
from pipelines.colours import ColourRule, draw_colours
from pipelines.normalisation import NORMALISATIONS
from pipelines.view_spec import ViewSpec
from tests.pipelines.pictures import noise, padded, sizes_of

SMALL = [(60, 70), (1, 1), (59, 3)]
IMAGES = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
BOXES = draw_boxes(sizes_of(IMAGES), torch.arange(3), 2, 0, 0)
COLOURS = draw_colours(torch.arange(3), 2, 0, 0, ColourRule(contrast=0.4, grayscale=0.3))
SPEC = ViewSpec(normalisation=NORMALISATIONS["imagenet"], size=24)


def test_without_a_compiler_views_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for colours in (None, COLOURS):
        compiled = make_views(padded(IMAGES), BOXES, SPEC, colours)
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.views_cpu.why_unavailable", lambda: "no C++ compiler")
            plain = make_views(padded(IMAGES), BOXES, SPEC, colours)
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
        assert compiled.stride() == plain.stride()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_flattened_views_are_dense_in_their_layout(channels_last: bool, dtype: torch.dtype) -> None:
    spec = ViewSpec(normalisation=SPEC.normalisation, size=24, dtype=dtype, channels_last=channels_last)
    views = make_views(padded(IMAGES), BOXES, spec)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert (views.shape, views.dtype) == ((2, 3, 3, 24, 24), dtype)
    assert views.flatten(0, 1).data_ptr() == views.data_ptr()
    assert views.flatten(0, 1).is_contiguous(memory_format=layout)
    assert views[1].is_contiguous(memory_format=layout)


def test_views_go_where_they_are_wanted_and_are_otherwise_new() -> None:
    out = SPEC.empty(2, 3, torch.device("cpu"))
    assert make_views(padded(IMAGES), BOXES, SPEC, out=out) is out
    first, second = make_views(padded(IMAGES), BOXES, SPEC), make_views(padded(IMAGES), BOXES, SPEC)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, out)


def test_a_view_does_not_depend_on_its_batch() -> None:
    together = make_views(padded(IMAGES), BOXES, SPEC)
    alone = random_boxes(sizes_of(IMAGES[2:]), torch.tensor([2]), 1, 0, 0)
    assert torch.equal(make_views(IMAGES[2][None], alone, SPEC), together[:1, 2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"dtype": torch.float16}, "float32 or torch.bfloat16"),
        ({"channels": 5}, "4 or 8"),
        ({"channels": 4, "channels_last": False}, "give 3"),
    ],
)
def test_views_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewSpec(normalisation=SPEC.normalisation, **options)  # type: ignore[arg-type]
