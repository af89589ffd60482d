"""Sources of images: the same samples from a folder and its .beton, decoded as PIL does, damage named."""

import io
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import DatasetFolder

from datasets_prep.conversion.codec import ImageOptions
from pcl_fast.errors import DataError
from pcl_fast.manifest import manifest_path
from pipelines.images import ImageSource, check_labels, decode, list_classes, open_images
from tests.datasets_prep.pictures import convert_folder, encoded, picture, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of three classes, two of them in a folder within a class."""
    path = write_folder(tmp_path_factory.mktemp("photos") / "train", images=9)
    inner = path / "c1" / "more"
    inner.mkdir()
    for number in (20, 21):
        (inner / f"{number}.jpg").write_bytes(encoded(picture(number)))
    (path / "c0" / "notes.txt").write_text("not an image")
    return path


@pytest.fixture(scope="module")
def beton(folder: Path) -> Path:
    path = folder.parent / "train.beton"
    convert_folder(folder, path)
    return path


def test_a_folder_and_its_beton_hold_the_same_samples(folder: Path, beton: Path) -> None:
    files, samples = open_images(folder), open_images(beton)
    assert files.labels_N.tolist() == samples.labels_N.tolist() == [0] * 3 + [1] * 5 + [2] * 3
    for sample in range(11):
        assert decode(files, sample).tobytes() == decode(samples, sample).tobytes()
    assert files.page_of_N is None
    assert samples.page_of_N is not None
    named = [(found.number, found.names) for found in (list_classes(folder), list_classes(beton))]
    assert named == [(3, ("c0", "c1", "c2"))] * 2


def test_raw_samples_are_their_pixels(folder: Path, tmp_path: Path) -> None:
    convert_folder(folder, tmp_path / "raw.beton", image=ImageOptions(mode="raw"))
    files, samples = open_images(folder), open_images(tmp_path / "raw.beton")
    for sample in range(11):
        assert decode(files, sample).tobytes() == decode(samples, sample).tobytes()


def test_without_a_manifest_labels_tell_the_number_of_classes(beton: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copy(beton, tmp_path / "bare.beton"))
    found = list_classes(bare)
    assert (found.number, found.names) == (3, None)
    assert found.fingerprint == list_classes(beton).fingerprint
    assert decode(open_images(bare), 4).size == (64, 48)


@pytest.mark.parametrize("kind", ["folder", "beton"])
def test_another_process_can_be_given_a_source(kind: str, request: pytest.FixtureRequest) -> None:
    source = open_images(request.getfixturevalue(kind))
    sent = pickle.loads(pickle.dumps(source))
    assert decode(sent, 7).tobytes() == decode(source, 7).tobytes()


ODD: dict[str, Any] = {
    "gray.jpg": (lambda: picture(1).convert("L"), {}),
    "cmyk.jpg": (lambda: picture(2).convert("CMYK"), {}),
    "rotated.jpg": (
        lambda: picture(3),
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ),
    "progressive.jpg": (lambda: picture(4), {"progressive": True}),
    "a.png": (lambda: picture(5), {}),
    "palette.png": (lambda: picture(6).quantize(20), {}),
    "alpha.png": (lambda: picture(7).convert("RGBA"), {}),
    "gray-alpha.png": (lambda: picture(8).convert("LA"), {}),
    "deep.png": (lambda: Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64)), {}),
}


def test_odd_kinds_become_rgb_as_pil_converts_them(tmp_path: Path) -> None:
    for name, (make, options) in ODD.items():
        place = tmp_path / "c0" / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(make(), "PNG" if name.endswith("png") else "JPEG", **options))
    (tmp_path / "c0" / "a.png").rename(tmp_path / "c0" / "named-wrongly.JPEG")
    source = open_images(tmp_path)
    names = sorted(path.name for path in (tmp_path / "c0").iterdir())
    assert len(source.labels_N) == len(names) == len(ODD)
    for sample, name in enumerate(names):
        expected = Image.open(tmp_path / "c0" / name)
        assert decode(source, sample).tobytes() == expected.convert("RGB").tobytes(), name


def by_pil(path: Path) -> bytes | None:
    """The pixels of a file, or None if PIL cannot decode them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(path.read_bytes())).convert("RGB").tobytes()
    except OSError:
        return None


def by_us(source: ImageSource, sample: int) -> bytes | None:
    try:
        return decode(source, sample).tobytes()
    except DataError:
        return None


def test_real_odd_images_are_pils_or_refused(shared_data: Path) -> None:
    folder = shared_data / "odd-images"
    source = open_images(folder)
    refused: list[str] = []
    for sample, (file, label) in enumerate(DatasetFolder(str(folder), str, (".jpg", ".jpeg")).samples):
        assert source.labels_N[sample] == label
        if Path(file).stat().st_size < 1_000_000:
            ours = by_us(source, sample)
            assert ours == by_pil(Path(file)), file
            refused += [Path(file).name] * (ours is None)
    assert "truncated_jpeg.jpg" in refused


def broken_sample(source_folder: Path, tmp_path: Path, data: bytes) -> tuple[Path, Path]:
    copy = shutil.copytree(source_folder, tmp_path / "copy")
    file = copy / "c1" / "0004.jpg"
    file.write_bytes(data)
    return copy, file


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "not an image"),
        (lambda data: b"GIF of a cat", "not an image"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, tmp_path: Path, damage: Any, reason: str) -> None:
    copy, file = broken_sample(folder, tmp_path, damage((folder / "c1" / "0004.jpg").read_bytes()))
    with pytest.raises(DataError) as caught:
        decode(open_images(copy), 4)
    message = str(caught.value)
    assert message.startswith(f"{file} is damaged (")
    assert reason in message
    assert "pcl-fast convert" in message
    assert "\n" not in message


def test_a_file_that_went_away_is_named(folder: Path, tmp_path: Path) -> None:
    copy, file = broken_sample(folder, tmp_path, b"")
    source = open_images(copy)
    file.unlink()
    with pytest.raises(DataError, match=r"0004\.jpg cannot be read: No such file"):
        decode(source, 4)


def test_changed_bytes_of_a_beton_are_never_decoded(beton: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(beton, tmp_path / "copy.beton"))
    shutil.copy(manifest_path(beton), manifest_path(copy))
    source: Any = open_images(copy)
    at = int(source.file.offsets_N[4] + source.file.lengths_N[4] // 2)
    with copy.open("r+b") as file:
        file.seek(at)
        file.write(bytes([source.file.encoded(4)[at - int(source.file.offsets_N[4])] ^ 1]))
    source = open_images(copy)
    for _ in range(2):  # and not the second time either
        with pytest.raises(DataError, match=r"sample 4 is damaged .*`pcl-fast verify"):
            decode(source, 4)
    assert decode(source, 5).tobytes() == decode(open_images(beton), 5).tobytes()


def test_what_is_no_data_set_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds train, not classes"):
        list_classes(folder.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no subfolders"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty" / "c0").mkdir()
    with pytest.raises(DataError, match="c0"):
        open_images(tmp_path / "empty")
    with pytest.raises(DataError, match="No such file"):
        open_images(tmp_path / "nothing")


def test_labels_must_be_of_the_classes(folder: Path) -> None:
    check_labels(open_images(folder), 3)
    with pytest.raises(DataError, match="sample 8 has label 2, but labels of 2 classes are 0 to 1"):
        check_labels(open_images(folder), 2)
