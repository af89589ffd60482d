"""Reading the pickles of the Python release without trusting them.

A pickle may name any callable and have it called. This reader knows the few that rebuild a numpy
array and refuses every other name, so that a prepared file can do no more than fail.
"""

import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np

from pcl_fast.errors import DataError


def load_plain_pickle(path: Path) -> dict[str, Any]:
    """The dict that a CIFAR pickle holds, its keys as text.

    DataError if the file is cut, is no pickle of a dict, or names anything but numpy arrays.
    """
    try:
        with path.open("rb") as file:
            # Python 2 wrote its byte strings without an encoding; latin-1 keeps every byte.
            content: object = _PlainUnpickler(file, encoding="latin1").load()
    except (DataError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path.name} is cut or not a pickle ({error}); get the release again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} holds a {type(content).__name__}, not the dict of a CIFAR release")
    return {_text(key): value for key, value in cast("dict[object, Any]", content).items()}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler for dicts, lists, strings, numbers and numpy arrays of those."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _array_callables().get((module_name.replace("numpy._core", "numpy.core"), global_name))
        if allowed is None:
            raise DataError(
                f"refused a pickle that names {module_name}.{global_name}: a CIFAR release holds only "
                "arrays, lists and strings; get it from its official home"
            )
        return allowed


def _array_callables() -> dict[tuple[str, str], Any]:
    # Numpy says itself which functions rebuild an array, whatever this version's private modules.
    sample = np.zeros(1, np.uint8)
    return {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): sample.__reduce__()[0],
        ("numpy.core.numeric", "_frombuffer"): sample.__reduce_ex__(5)[0],
        # Python 3 writes bytes as this call in the protocols of Python 2.
        ("_codecs", "encode"): _encode_latin1,
    }


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding}")
    return text.encode("latin1")


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
