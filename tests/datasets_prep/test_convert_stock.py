"""What we write, stock FFCV 1.0.2 reads: its Reader, and its Loader with its own decoders."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets_prep.conversion.codec import ImageOptions, Mode
from pcl_fast.beton import JPG, RAW, open_beton
from tests.datasets_prep.pictures import convert_folder, decoded, encoded, picture

# Nothing of ours in here.
READ = """
import json, sys
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import ToTensor

for name, os_cache in json.loads(sys.argv[1]):
    reader = Reader(name)
    assert reader.field_names == ["image", "label"], reader.field_names
    pipelines = {"image": [SimpleRGBImageDecoder(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    loader = Loader(name, batch_size=8, num_workers=1, os_cache=os_cache, order=OrderOption.SEQUENTIAL,
                    drop_last=False, pipelines=pipelines)
    batches = [(images.numpy().copy(), labels.numpy().copy()) for images, labels in loader]
    images, labels = (np.concatenate(parts) for parts in zip(*batches))
    np.savez(name + ".npz", images=images, labels=labels[:, 0], modes=reader.metadata["f0"]["mode"])
"""
IMAGES = 21
SIZE = {"width": 1040, "height": 780}  # some pages of pixels


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one size: gray, colour, progressive, and a PNG that is called JPEG."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(IMAGES):
        image = picture(number, **SIZE)
        kinds = [
            encoded(image, quality=90),
            encoded(image.convert("L"), quality=90),
            encoded(image, quality=90, progressive=True),
            encoded(image, "PNG", compress_level=1),
        ]
        place = folder / f"class{number % 4}"
        place.mkdir(exist_ok=True)
        (place / f"{number:02}.JPEG").write_bytes(kinds[number % 5 % 4])
    return folder


@pytest.mark.timeout(150)  # FFCV compiles its pipelines
def test_stock_ffcv_reads_every_mode(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: pip install 'pcl-fast[ffcv]'")
    modes: list[tuple[Mode, bool]] = [("jpg", False), ("raw", False), ("smart", True)]
    for mode, _ in modes:
        # At this threshold, "smart" stores everything raw: the pictures are of one size, for the decoder.
        options = ImageOptions(mode=mode, max_side=0, smart_threshold=3 * SIZE["width"] * SIZE["height"])
        convert_folder(source, tmp_path / f"{mode}.beton", image=options)
    asked = json.dumps([(f"{mode}.beton", cache) for mode, cache in modes])
    words = [sys.executable, "-c", READ, asked]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr

    files = sorted(source.rglob("*.JPEG"))
    expected = np.stack([decoded(path.read_bytes()) for path in files])
    for mode, _ in modes:
        read = np.load(tmp_path / f"{mode}.beton.npz")
        assert read["labels"].tolist() == [int(path.parent.name[5:]) for path in files]
        assert set(read["modes"].tolist()) == {JPG if mode == "jpg" else RAW}
        if mode == "jpg":
            with open_beton(tmp_path / "jpg.beton") as beton:
                stored = np.stack([decoded(bytes(beton.encoded(i))) for i in range(IMAGES)])
            difference = np.abs(read["images"].astype(int) - stored)
            assert difference.max() <= 16, "FFCV decodes with the fast, inexact transform"
            assert difference.mean() < 1.0
        else:
            np.testing.assert_array_equal(read["images"], expected)
    with open_beton(tmp_path / "raw.beton") as beton:
        assert len(set(beton.page_of_N.tolist())) > 3
        assert (
            beton.offsets_N // beton.page_size == (beton.offsets_N + beton.lengths_N - 1) // beton.page_size
        ).all()
