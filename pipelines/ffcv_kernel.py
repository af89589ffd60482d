"""Decoding a batch in numba's threads, without the interpreter's lock: libturbojpeg, and then perhaps views.

Imports numba. Native functions are called by their addresses, which are arguments, so that what numba
compiles depends on nothing but this file and is kept on disk from run to run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_thread_id, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

# The columns of a batch's table, int64, a row for each image: where its stored bytes lie (ADDRESS, LENGTH),
# what they are (HEIGHT, WIDTH, MODE), where its pixels go (OUT, 0: to memory of the thread's; STRIDE, bytes
# a row), the job of views to do (0: none), its CRC-32 (-1: not to be checked), and what became of it.
ADDRESS, LENGTH, HEIGHT, WIDTH, MODE, OUT, STRIDE, JOB, CHECKSUM, STATUS = range(10)
COLUMNS = 10
DONE, WARNED, FAILED, OTHER_SIZE, CHANGED = range(5)

# The native functions, in the order of their addresses; the last is views_cpu's.
FUNCTIONS = (
    "tjInitDecompress",
    "tjDecompressHeader3",
    "tjDecompress2",
    "tjGetErrorCode",
    "tjDestroy",
    "crc32",
    "memcpy",
)
_INIT, _HEADER, _DECOMPRESS, _ERROR_CODE, _DESTROY, _CRC32, _MEMCPY, _VIEWS = range(len(FUNCTIONS) + 1)
INFO = 4  # what tjDecompressHeader3 tells: width, height, subsampling, colours; int32
_RAW, _RGB, _ACCURATE, _INT = 1, 0, 0, 0xFFFFFFFF


def _compiled(**options: bool) -> Callable[[Any], Any]:
    """Compile a function, and keep the result on disk if there is a place for it."""

    def compiled(function: Any) -> Any:
        how: dict[str, Any] = {"nogil": True, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **how)(function)
        except RuntimeError:  # neither beside this file nor in the user's cache folder
            return njit(**how)(function)

    return compiled


def _code_of_call(_, address, arguments):  # pyright: ignore[reportMissingParameterType]
    """The C function at an address, of 64-bit integers or pointers; what it returns is one, too."""

    def codegen(context, builder, signature, values):  # pyright: ignore[reportMissingParameterType]
        words = cgutils.unpack_tuple(builder, values[1])
        function = ir.FunctionType(ir.IntType(64), [word.type for word in words])
        return builder.call(builder.inttoptr(values[0], function.as_pointer()), words)

    return types.int64(address, arguments), codegen


_call: Any = intrinsic(_code_of_call)


@_compiled()
def _decompress(row, pixels, stride, natives, handle, info):  # pyright: ignore[reportMissingParameterType]
    data, length = row[ADDRESS], row[LENGTH]
    at = np.int64(info.ctypes.data)
    header = _call(natives[_HEADER], (handle, data, length, at, at + 4, at + 8, at + 12))
    if header & _INT:
        return FAILED
    if info[0] != row[WIDTH] or info[1] != row[HEIGHT]:
        return OTHER_SIZE
    asked = (handle, data, length, pixels, row[WIDTH], stride, row[HEIGHT], _RGB, _ACCURATE)
    if _call(natives[_DECOMPRESS], asked) & _INT == 0:
        return DONE
    return FAILED if _call(natives[_ERROR_CODE], (handle,)) & _INT else WARNED


@_compiled()
def _decode(table, number, natives, handle, info, scratch):  # pyright: ignore[reportMissingParameterType]
    row = table[number]
    data, length, pixels, stride = row[ADDRESS], row[LENGTH], row[OUT], row[STRIDE]
    if row[CHECKSUM] >= 0 and _call(natives[_CRC32], (0, data, length)) & _INT != row[CHECKSUM]:
        return CHANGED
    status, dense = DONE, 3 * row[WIDTH]
    if pixels == 0:
        pixels, stride = scratch, dense
    if row[MODE] != _RAW:
        status = _decompress(row, pixels, stride, natives, handle, info)
        if status > WARNED:
            return status
    elif row[OUT] == 0:
        pixels = data
    else:
        for y in range(row[HEIGHT]):
            _call(natives[_MEMCPY], (pixels + y * stride, data + y * dense, dense))
    if row[JOB]:
        _call(natives[_VIEWS], (row[JOB], pixels, stride, np.int64(number)))
    return status


@_compiled(parallel=True)
def decode_all(table, natives, handles, infos, scratches):  # pyright: ignore[reportMissingParameterType]
    """Decode every row of a table; each thread has a decoder's handle (0 at first), INFO, and memory."""
    for number in prange(len(table)):
        thread = get_thread_id()
        if handles[thread] == 0:
            handles[thread] = _call(natives[_INIT], ())
        scratch = np.int64(scratches[thread].ctypes.data)
        table[number, STATUS] = _decode(table, number, natives, handles[thread], infos[thread], scratch)


@_compiled()
def free_handles(natives, handles):  # pyright: ignore[reportMissingParameterType]
    """Give back the decoders' memory."""
    for thread in range(len(handles)):
        if handles[thread]:
            _call(natives[_DESTROY], (handles[thread],))
            handles[thread] = 0
