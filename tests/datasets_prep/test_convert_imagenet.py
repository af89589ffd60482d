"""ImageNet as people have it: tar files, folders, and every form of the ground truth."""

import base64
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets_prep.convert import ConvertOptions, convert
from datasets_prep.listings.imagenet import Split, list_imagenet
from datasets_prep.listings.mat5 import read_structures
from pcl_fast.errors import DataError
from pcl_fast.manifest import open_with_manifest
from tests.datasets_prep.pictures import encoded, picture, stopping_at

# What the devkit's file says of three classes and of one of their ancestors, written by scipy 1.17's
# savemat(compress=True): ids 1 to 3, and 1001, which has two children.
META = base64.b64decode(
    """
TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IE1vbiBOb3YgMjMgMTQ6NDA6MTYgMjAyNgAA
AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAsAEAAHic7ZRBT8IwFMcLQYSD
BD15Mv0AmGyIAidI1AQSY4gaPJK6lbVhK2YtQb6BNy9+UD6CrWwwmukIvfKSt+X/lv+ve9trKwAAqwxAUd5LMvNgFUeRLsjMRXks
ky8Yx4LL5wVwGtU/ZfYfnodPt3XLro/6dwrw+ri6r2M+DV2eLHj+lG8V2CwYOYT6bojZb2FLxAyGxYhg6hERWUSIKBvRAHmYg4os
tsCmn6LWTy6RKspRfRXLjvJ3E/5Cir+c8Fcjzay6bbebrXZUV5xeBudc4yg9oQKOpx81OJz575jDADnhVFC+y3tVNJ7SPEC+D70Q
LxQWGH6fld/6xx9H0h/7TNfd2z/47hqu3zWZC8tqXl0n+sjipP3He+b5lBMoN5/A4W6cqsZRiRiMUW8hxu5hHvZZv2QwD3ajYTVv
Gok+ss6JM42jtMDMITX4QpmDoFDXDW+QwbvQeEqPQ8zJHMnZgi5y8KVPJxh6KMBwLGflcG7s5e99GcyJDLvZsP7oI41T1DhKYyao
WOx2XpxofqUFQQLOCXUIpNz0e6aco2n+vOavru3LTpJjun9N5uoHfGV2Cg==
    """
)
CLASSES = ("n01440764", "n02100735", "n02119789")
ID_OF = {"n02119789": 1, "n02100735": 2, "n01440764": 3}  # in the devkit, which is not alphabetical
VAL = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 8)]
TRUTH = [CLASSES[(2 * number + 1) % 3] for number in range(7)]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1_300_000_000
    archive.addfile(info, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            add(archive, name, data)
    return content.getvalue()


def train_images() -> dict[str, bytes]:
    """WNID/FILE to bytes, in the order they should be listed in."""
    names = [f"{wnid}/{wnid}_{number}.JPEG" for wnid in CLASSES for number in (10, 7, 88)]
    return {name: encoded(picture(seed)) for seed, name in enumerate(sorted(names))}


def val_images() -> dict[str, bytes]:
    return {name: encoded(picture(100 + seed)) for seed, name in enumerate(VAL)}


def write_tars(folder: Path) -> None:
    """As published: a tar of tars, in no particular order inside, and a flat tar."""
    folder.mkdir(exist_ok=True)
    train = train_images()
    inner = {
        f"{wnid}.tar": tar_of({name[10:]: train[name] for name in reversed(train) if name.startswith(wnid)})
        for wnid in (CLASSES[2], CLASSES[0], CLASSES[1])
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(val_images().items()))))


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def ids() -> str:
    return "".join(f"{ID_OF[wnid]}\n" for wnid in TRUTH)


def devkit(folder: Path) -> None:
    top = "ILSVRC2012_devkit_t12"
    files = {
        f"{top}/readme.txt": b"read me",
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": ids().encode(),
        f"{top}/data/meta.mat": META,
    }
    (folder / f"{top}.tar.gz").write_bytes(tar_of(files, "w:gz"))


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """What `extractall` does, whose arguments differ from one Python to the next."""
    for member in archive:
        if file := archive.extractfile(member):
            write_files(folder, {member.name: file.read()})


def unpacked_devkit(folder: Path) -> None:
    devkit(folder)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz") as archive:
        unpack(archive, folder)
    (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()


def kaggle(folder: Path) -> None:
    rows = [f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in zip(VAL, TRUTH, strict=True)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))


def wnids_in_order(folder: Path) -> None:
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(TRUTH) + "\n")


def files_and_wnids(folder: Path) -> None:
    (folder / "val.txt").write_text("".join(f"{n} {w}\n" for n, w in zip(VAL, TRUTH, strict=True)))


def files_and_labels(folder: Path) -> None:
    (folder / "val.txt").write_text(
        "".join(f"val/{n}\t{CLASSES.index(w)}\n" for n, w in zip(VAL, TRUTH, strict=True))
    )


TRUTHS = [devkit, unpacked_devkit, kaggle, wnids_in_order, files_and_wnids, files_and_labels]


@pytest.mark.parametrize("write_truth", TRUTHS)
def test_every_form_of_the_ground_truth(tmp_path: Path, write_truth: Callable[[Path], None]) -> None:
    write_tars(tmp_path)
    write_truth(tmp_path)
    listing = list_imagenet(tmp_path, "val")
    assert listing.names == VAL
    assert listing.classes == CLASSES
    assert [CLASSES[label] for label in listing.labels_N] == TRUTH


def convert_split(source: Path, split: Split, destination: Path) -> None:
    listing = list_imagenet(source, split)
    convert(listing, destination, ConvertOptions(workers=1), print, stopping_at(1 << 60))


def assert_holds(path: Path, images: list[bytes], labels: list[int]) -> None:
    beton, manifest = open_with_manifest(path)
    assert manifest is not None
    assert manifest.classes == CLASSES
    assert beton.labels_N.tolist() == labels
    assert [bytes(beton.encoded(sample)) for sample in range(beton.num_samples)] == images
    beton.close()


def test_tar_files_and_folders_give_the_same_file(tmp_path: Path) -> None:
    train, val = train_images(), val_images()
    in_classes = {f"val/{wnid}/{name}": val[name] for name, wnid in zip(VAL, TRUTH, strict=True)}
    write_tars(tmp_path / "tars")
    devkit(tmp_path / "tars")
    kaggle_root = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    for root in (tmp_path / "folders", kaggle_root):
        write_files(root, {f"train/{name}": data for name, data in train.items()})
    write_files(tmp_path / "folders", in_classes)
    write_files(kaggle_root, {f"val/{name}": data for name, data in val.items()})
    kaggle(tmp_path / "kaggle")
    with tarfile.open(tmp_path / "tars" / "ILSVRC2012_img_train.tar") as archive:
        unpack(archive, tmp_path / "half" / "train")

    train_labels = [label for label in range(3) for _ in range(3)]
    val_labels = [CLASSES.index(wnid) for wnid in TRUTH]
    for kind in ("tars", "folders", "kaggle", "half"):
        convert_split(tmp_path / kind, "train", tmp_path / f"{kind}-train.beton")
        assert_holds(tmp_path / f"{kind}-train.beton", list(train.values()), train_labels)
    for kind in ("tars", "kaggle"):
        convert_split(tmp_path / kind, "val", tmp_path / f"{kind}-val.beton")
        assert_holds(tmp_path / f"{kind}-val.beton", list(val.values()), val_labels)
    convert_split(tmp_path / "folders", "val", tmp_path / "folders-val.beton")
    by_class = sorted(zip(val_labels, val.values(), strict=True), key=lambda pair: pair[0])
    assert_holds(tmp_path / "folders-val.beton", [data for _, data in by_class], sorted(val_labels))


def test_a_ground_truth_can_be_given(tmp_path: Path) -> None:
    write_tars(tmp_path)
    with pytest.raises(DataError, match=r"no ground truth .*devkit.*LOC_val_solution\.csv.*--labels"):
        list_imagenet(tmp_path, "val")
    (tmp_path / "elsewhere").mkdir()
    unpacked_devkit(tmp_path / "elsewhere")
    for given in (
        "ILSVRC2012_devkit_t12",
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
    ):
        listing = list_imagenet(tmp_path, "val", tmp_path / "elsewhere" / given)
        assert [CLASSES[label] for label in listing.labels_N] == TRUTH


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("1\n2\n", r"numbers mean nothing without meta\.mat"),
        ("n01440764\n", r"says nothing of ILSVRC2012_val_00000002\.JPEG"),
        ("tench\n" * 7, "'tench' is not a WordNet id"),
        ("n09999999\n" * 7, "n09999999, which is none of the training classes"),
        ("".join(f"{name} 3\n" for name in VAL), "'3' is not the number of a class"),
    ],
)
def test_a_wrong_ground_truth_is_named(tmp_path: Path, text: str, said: str) -> None:
    write_tars(tmp_path)
    (tmp_path / "truth.txt").write_text(text)
    with pytest.raises(DataError, match=said) as error:
        list_imagenet(tmp_path, "val", tmp_path / "truth.txt")
    assert "truth.txt" in str(error.value)


def test_a_source_without_imagenet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        list_imagenet(tmp_path / "absent", "train")
    with pytest.raises(DataError, match=r"has neither ILSVRC2012_img_train\.tar nor a folder train/"):
        list_imagenet(tmp_path, "train")


@pytest.mark.parametrize("size", [100, 5000, -1, -11_000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_cut_tar_is_named(tmp_path: Path, size: int, split: Split) -> None:
    write_tars(tmp_path)
    wnids_in_order(tmp_path)
    path = tmp_path / f"ILSVRC2012_img_{split}.tar"
    # Zeros at the end of a tar, as those of its last block, are only padding.
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:size])
    with pytest.raises(DataError, match=rf"img_{split}\.tar is cut, compressed or not a tar file"):
        list_imagenet(tmp_path, split)


def test_a_compressed_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val_images(), "w:gz"))
    wnids_in_order(tmp_path)
    with pytest.raises(DataError, match=r"compressed or not a tar file.* decompress it first"):
        list_imagenet(tmp_path, "val")


def test_matlabs_structures() -> None:
    rows = read_structures(META)
    assert [row["WNID"] for row in rows] == ["n02119789", "n02100735", "n01440764", "n00001740"]
    assert [row["ILSVRC2012_ID"] for row in rows] == [1, 2, 3, 1001]
    assert [row["num_children"] for row in rows] == [0, 0, 0, 2]
    assert rows[0]["words"] == "kit fox, Vulpes macrotis"
    for cut in (0, 100, 130, 300, len(META) - 1):
        with pytest.raises(ValueError, match=r"."):
            read_structures(META[:cut])


def test_reading_a_listed_image_is_reading_the_file(tmp_path: Path) -> None:
    write_tars(tmp_path)
    listing = list_imagenet(tmp_path, "train")
    for index, (name, data) in enumerate(train_images().items()):
        place = listing.place(index)
        assert listing.names[index] == name
        with open(place.file, "rb") as file:
            assert os.pread(file.fileno(), place.size, place.offset) == data
