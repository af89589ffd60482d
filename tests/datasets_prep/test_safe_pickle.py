"""Pickles of arrays are read; anything that would call something is refused before it is called."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets_prep.safe_pickle import load_plain_pickle
from pcl_fast.errors import DataError
from tests.datasets_prep.tiny import python2_pickle

PIXELS = np.arange(512, dtype=np.uint8).reshape(2, 256)


@pytest.mark.parametrize("keys", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_arrays_of_every_protocol(protocol: int, keys: Callable[[str], object], tmp_path: Path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({keys("data"): PIXELS, keys("labels"): [3, 250]}, protocol))
    content = load_plain_pickle(path)
    np.testing.assert_array_equal(content["data"], PIXELS)
    assert content["data"].dtype == np.uint8
    assert content["labels"] == [3, 250]


def test_reads_what_python_2_wrote(tmp_path: Path):
    data = python2_pickle({"data": PIXELS, "labels": [1, 2], "filenames": ["caf\xe9.png"]})
    assert b"numpy.core.multiarray" in data
    path = tmp_path / "batch"
    path.write_bytes(data)
    content = load_plain_pickle(path)
    np.testing.assert_array_equal(content["data"], PIXELS)
    assert content["filenames"] == ["caf\xe9.png"]


class Calls:
    """Pickles into a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["top", "value", "in a list", "in an array"])
def test_refuses_to_call(place: str, protocol: int, tmp_path: Path):
    proof = tmp_path / "called"
    call = Calls(os.mkdir, str(proof))
    content = {
        "top": call,
        "value": {"data": PIXELS, "labels": call},
        "in a list": {"data": PIXELS, "labels": [1, call]},
        "in an array": {"data": np.array([call], object), "labels": [1]},
    }[place]
    data = pickle.dumps(content, protocol)
    path = tmp_path / "batch"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"refused a pickle that names posix\.mkdir"):
        load_plain_pickle(path)
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists(), "the pickle was harmless, so this test proved nothing"


@pytest.mark.parametrize("call", [(eval, "1"), (getattr, "a", "upper"), (__import__, "os"), (np.load, "x")])
def test_refuses_other_roads(call: tuple[object, ...], tmp_path: Path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": Calls(*call)}))
    with pytest.raises(DataError, match="refused a pickle that names"):
        load_plain_pickle(path)


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_cut_pickle_is_a_data_error(kept: int, tmp_path: Path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": PIXELS})[:kept])
    with pytest.raises(DataError, match="batch is cut or not a pickle"):
        load_plain_pickle(path)


@pytest.mark.parametrize("content", [[1, 2], "data", 3, None])
def test_other_content_is_a_data_error(content: object, tmp_path: Path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="not the dict of a CIFAR release"):
        load_plain_pickle(path)
