"""The element types of a checkpoint, by torch's names, and how zarr stores them.

zarr-python knows no bfloat16 or fp8: such an array is stored as unsigned integers of the same width, with the true
type beside it in the array's attributes, so that it stays readable.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

_NUMPY: dict[str, type] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
NAMES = tuple(_NUMPY)
_FOREIGN = {name for name in NAMES if name.startswith(("bfloat", "float8"))}  # types that zarr does not support


def numpy_dtype(name: str) -> np.dtype:
    """The numpy type of a torch type's name. Raises ValueError for a name that is not in `NAMES`."""
    try:
        return np.dtype(_NUMPY[name])
    except KeyError:
        raise ValueError(f"element type {name!r} is not one of {', '.join(NAMES)}") from None


def dtype_name(dtype: np.dtype) -> str:
    """The torch name of a numpy type. Raises ValueError if there is none."""
    for name, kind in _NUMPY.items():
        if np.dtype(kind) == dtype:
            return name
    raise ValueError(f"element type {dtype} has no counterpart in torch")


def stored_name(name: str) -> str:
    """The zarr data type under which arrays of `name` are stored."""
    return f"uint{numpy_dtype(name).itemsize * 8}" if name in _FOREIGN else name
