"""`pcl-fast convert` and `verify` as they are typed."""

from pathlib import Path

import pytest
from PIL import Image

from pcl_fast import cli
from pcl_fast.manifest import open_with_manifest
from tests.datasets_prep.pictures import names, write_folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PCL_FAST_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def run(*words: str) -> int | str | None:
    try:
        return cli.main(words)
    except SystemExit as exit:
        return exit.code


def test_convert_verify_and_look(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_folder(Path("photos"), 20, 4, width=300, height=200)
    Path("photos/c1/readme.txt").write_text("no image")
    words = ("convert", "imagefolder", "photos", "made/train.beton")
    assert (
        run(*words, "--max-side", "150", "--mode", "smart", "--smart-threshold", "30000", "--workers", "2")
        == 0
    )
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("made/train.beton: 20 images in 4 classes, ")
    assert out.splitlines()[1] == "  20 encoded anew, 20 shrunk"
    assert out.splitlines()[2] == "next:  pcl-fast verify made/train.beton --sheet made/train.png"
    assert "image folder: 20 images in 4 classes -> made/train.beton" in err
    assert "1 file is no image and is left alone: c1/readme.txt" in err
    assert "20 of 20 images" in err
    assert names(Path("made")) == ["train.beton", "train.beton.manifest.json"]
    beton, manifest = open_with_manifest("made/train.beton")
    assert manifest is not None
    assert manifest.options == {
        "mode": "smart",
        "max_side": 150,
        "quality": 90,
        "smart_threshold": 30000,
        "page_size": 1 << 23,
    }
    assert beton.sizes_N2.tolist() == [[100, 150]] * 20
    beton.close()

    assert run(*out.splitlines()[2].split()[2:]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("made/train.png: ")
    assert out.splitlines()[1].endswith("structure, labels, checksums and every image are right")
    with Image.open("made/train.png") as sheet:
        assert sheet.format == "PNG"


def test_both_splits_of_imagenet(capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 6), ("val", 3)):
        write_folder(Path("imagenet") / split, count, 3)
    assert run("convert", "imagenet", "imagenet", "made", "--workers", "1") == 0
    assert names(Path("made")) == [
        f"{split}.beton{ending}" for split in ("train", "val") for ending in ("", ".manifest.json")
    ]
    assert run("convert", "imagenet", "imagenet", "one.beton", "--split", "val", "--workers", "1") == 0
    assert Path("one.beton").read_bytes() == Path("made/val.beton").read_bytes()
    capsys.readouterr()
    assert run("convert", "imagenet", "imagenet", "two.beton") == 2
    assert "give --split train or --split val, or a folder for both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["convert", "imagefoldr", "a", "b"], 2, "unknown kind 'imagefoldr'. Did you mean 'imagefolder'?"),
        (
            ["convert", "imagefolder", "absent", "x.beton"],
            3,
            "absent does not exist; give the folder that has",
        ),
        (["convert", "imagefolder", "photos", "photos"], 2, "photos is a folder; give the name of the file"),
        (["convert", "imagefolder", "photos", "x.beton", "--quality", "0"], 2, "--quality 0: give 1 to 100"),
        (
            ["convert", "imagefolder", "photos", "x.beton", "--page-size", "3"],
            2,
            "--page-size 3: give a power",
        ),
        (["convert", "cifar10", "x.beton"], 3, "is missing; run `pcl-fast fetch cifar10`"),
        (["convert", "imagenet", "photos", "made"], 3, "has neither ILSVRC2012_img_train.tar nor a folder"),
        (["verify", "absent.beton"], 3, "absent.beton cannot be opened: No such file"),
        (["verify", "photos/c0/0000.jpg"], 3, "less than the header of a .beton file"),
        (
            ["verify", "absent.beton", "--sheet", "sheet.txt"],
            2,
            "--sheet sheet.txt: give a name that ends with",
        ),
        (["verify", "absent.beton", "--workers", "-1"], 2, "--workers -1: give 0 or more"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(Path("photos"), 2, 2)
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("pcl-fast: error: ")
    assert names(Path()) == ["photos"]


def test_a_bad_image_fails_at_the_end_with_the_command_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("photos"), 6, 2)
    Path("photos/c1/zero.jpg").write_bytes(b"")
    assert run("convert", "imagefolder", "photos", "x.beton", "--workers", "1") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "  c1/zero.jpg: the file is empty" in err.splitlines()
    assert "--max-bad 1" in err.splitlines()[-1]
    assert names(Path()) == ["photos", "x.beton.converting", "x.beton.quarantine.txt"]
    assert run("convert", "imagefolder", "photos", "x.beton", "--workers", "1", "--max-bad", "1") == 0
    assert "1 left out (see x.beton.quarantine.txt)" in capsys.readouterr().out
    assert run("convert", "imagefolder", "photos", "x.beton") == 2
    assert "x.beton exists already" in capsys.readouterr().err
