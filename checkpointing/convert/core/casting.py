"""Changing the precision of tensors as torch does: to the nearest, ties to even."""

from __future__ import annotations

import numpy as np

from everstep.checkpointing.universal.dtypes import numpy_dtype


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` as torch's `dtype`; itself if it is that already."""
    target = numpy_dtype(dtype)
    if array.dtype == target:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(target)
