"""Reading .beton files: what FFCV's own reader says is right, and nothing that is damaged is opened."""

import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcl_fast.beton import ALLOCATION, FIELD, HEADER, JPG, RAW, SAMPLE, SAMPLES_AT, open_beton
from pcl_fast.errors import DataError
from tests.datasets_prep.pictures import convert_folder, write_folder

# FFCV's own types and its own writer; one worker, so that it has one layout.
STOCK = """
import sys
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type
from ffcv.writer import DatasetWriter

def main():
    sizes = [HeaderType.itemsize, FieldDescType.itemsize, ALLOC_TABLE_TYPE.itemsize]
    sizes.append(get_metadata_type([RGBImageField(), IntField()]).itemsize)
    draws = np.random.default_rng(0)
    samples = [(draws.integers(0, 256, (20 + i, 30, 3), np.uint8), 7 * i) for i in range(9)]
    np.savez(sys.argv[2], *[image for image, _ in samples])
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(sys.argv[1], fields, num_workers=1).from_indexed_dataset(samples, chunksize=2)
    print(sizes)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 12 JPEGs in 3 classes."""
    folder = tmp_path_factory.mktemp("converted")
    convert_folder(write_folder(folder / "source"), folder / "file.beton")
    return folder / "file.beton"


def test_a_file_by_ffcvs_writer_is_read(tmp_path: Path) -> None:
    pytest.importorskip("ffcv", reason="ffcv is not installed: pip install 'pcl-fast[ffcv]'")
    (tmp_path / "stock.py").write_text(STOCK)
    words = [sys.executable, "stock.py", "stock.beton", "images.npz"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    ours = [HEADER.itemsize, FIELD.itemsize, ALLOCATION.itemsize, SAMPLE.itemsize]
    assert done.stdout.splitlines()[-1] == str(ours)
    images = list(np.load(tmp_path / "images.npz").values())
    with open_beton(tmp_path / "stock.beton") as beton:
        assert beton.num_samples == 9
        assert beton.labels_N.tolist() == [7 * i for i in range(9)]
        assert beton.modes_N.tolist() == [RAW] * 9
        for sample, image in enumerate(images):
            assert beton.sizes_N2[sample].tolist() == list(image.shape[:2])
            assert bytes(beton.encoded(sample)) == image.tobytes()


def test_what_is_in_a_file(converted: Path) -> None:
    files = sorted((converted.parent / "source").rglob("*.jpg"))
    beton = open_beton(str(converted))
    assert (beton.path, beton.num_samples, beton.page_size) == (converted, 12, 1 << 23)
    assert beton.labels_N.dtype == np.int64
    assert beton.labels_N.tolist() == [int(path.parent.name[1]) for path in files]
    assert beton.modes_N.tolist() == [JPG] * 12
    assert beton.sizes_N2.tolist() == [[48, 64]] * 12
    for sample, path in enumerate(files):
        assert bytes(beton.encoded(sample)) == path.read_bytes()
        assert beton.checksum(sample) == zlib.crc32(path.read_bytes())
    assert beton.lengths_N.tolist() == [path.stat().st_size for path in files]
    assert (beton.page_of_N == beton.offsets_N // beton.page_size).all()
    beton.close()


def test_image_data_outlive_the_file(converted: Path) -> None:
    with open_beton(converted) as beton:
        data = beton.encoded(3)
        expected = bytes(data)
    beton.close()
    assert bytes(data) == expected
    data.release()


def test_pickled_it_is_opened_again(converted: Path) -> None:
    with open_beton(converted) as beton, pickle.loads(pickle.dumps(beton)) as again:
        assert bytes(again.encoded(11)) == bytes(beton.encoded(11))
        assert again.structure_crc32 == beton.structure_crc32


Change = Callable[[bytearray], None]


def header(**changes: int) -> Change:
    def change(content: bytearray) -> None:
        for name, value in changes.items():
            np.frombuffer(content, HEADER, 1)[name] = value

    return change


def sample(number: int, **changes: int) -> Change:
    def change(content: bytearray) -> None:
        for name, value in changes.items():
            np.frombuffer(content, SAMPLE, 12, SAMPLES_AT)[name][number] = value

    return change


def entry(number: int, **changes: int) -> Change:
    """Change the table, and the sample's offset with it."""

    def change(content: bytearray) -> None:
        (table_offset,) = struct.unpack_from("<Q", content, 16)
        for name, value in changes.items():
            np.frombuffer(content, ALLOCATION, 12, table_offset)[name][number] = value
            if name == "offset":
                np.frombuffer(content, SAMPLE, 12, SAMPLES_AT)[name][number] = value

    return change


def field_name(content: bytearray) -> None:
    np.frombuffer(content, FIELD, 2, HEADER.itemsize)["name"][0] = b"picture"


PAGE = 1 << 23


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (header(version=3), "not a .beton file of version 2"),
        (header(num_fields=3), "3 fields"),
        (header(page_size=12345), "pages of 12345 bytes"),
        (header(page_size=1 << 20), "pages of 1048576 bytes"),
        (header(table_offset=0), "never finished"),
        (header(num_samples=0), "no samples"),
        (header(num_samples=11), "followed by something else"),
        (header(num_samples=13), "it is cut"),
        (header(num_samples=1 << 60), "inside the samples"),
        (header(table_offset=100), "inside the samples"),
        (header(table_offset=1 << 62), "it is cut"),
        (field_name, "its fields are"),
        (sample(2, mode=2), "sample 2 has a mode"),
        (sample(3, mode=RAW), "sample 3 has not height x width x 3 bytes"),
        (sample(4, width=0), "sample 4 has no pixels"),
        (sample(5, label=-1), "sample 5 has a negative label"),
        (sample(6, offset=PAGE), "sample 6 has a place that is not the table's"),
        (entry(7, sample=3), "does not hold each sample once"),
        (entry(8, length=0), "sample 8 has no data"),
        (entry(8, length=1 << 40), "sample 8 lies outside"),
        (entry(8, length=(1 << 64) - 1), "sample 8 lies outside"),
        (entry(0, length=6000), "overlaps another"),
        (entry(9, offset=100), "sample 9 lies outside"),
        (entry(10, offset=(1 << 64) - 1), "sample 10 lies outside"),
        (entry(11, length=PAGE), "sample 11 crosses the end of its page"),
    ],
)
def test_whatever_is_wrong_is_named(converted: Path, tmp_path: Path, change: Change, said: str) -> None:
    content = bytearray(converted.read_bytes())
    change(content)
    path = tmp_path / "changed.beton"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        open_beton(path)
    assert str(path) in str(error.value)
    assert "pcl-fast convert" in str(error.value)


def test_other_things_are_no_beton_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.beton cannot be opened: No such file"):
        open_beton(tmp_path / "absent.beton")
    with pytest.raises(DataError, match="Is a directory"):
        open_beton(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="it has 0 bytes"):
        open_beton(tmp_path / "empty")
    (tmp_path / "text").write_text("not a beton file\n" * 500)
    with pytest.raises(DataError, match=r"not a \.beton file of version 2"):
        open_beton(tmp_path / "text")
