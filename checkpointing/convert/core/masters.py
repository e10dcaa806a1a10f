"""Checks that the module's weights are the rounded master weights. If they are not, the checkpoint was assembled
wrongly, by its library or by a reader that misunderstands its layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from everstep.checkpointing.universal.dtypes import numpy_dtype

from .casting import cast
from .content import ConversionError, Lazy

SETTING = "masters"
TRUSTED = "trust"
_RUN = 1 << 18  # elements


def is_trusted(settings: dict[str, str]) -> bool:
    """Whether the user wants master weights as they are. Raises ConversionError for a setting that is none."""
    value = settings.get(SETTING, "")
    if value not in ("", TRUSTED):
        raise ConversionError(f"--set {SETTING}={value}: expected {TRUSTED}")
    return value == TRUSTED


def checked(name: str, master: Lazy, weight: Callable[[], np.ndarray], dtype: str) -> Lazy:
    """A master weight that is compared with the module's when it is read: `weight` gives that, of element type `dtype`.

    Reading it raises ConversionError where they differ.
    """

    def read() -> np.ndarray:
        found = master.read()
        check(name, found, weight(), dtype)
        return found

    return replace(master, read=read)


def check(name: str, master: np.ndarray, weight: np.ndarray, dtype: str) -> None:
    """Raise ConversionError if a master weight, rounded, is not the module's; compared run by run, in little memory."""
    masters, weights = master.reshape(-1), weight.reshape(-1)
    wrong, first = 0, ""
    for start in range(0, masters.size, _RUN):
        rounded, own = cast(masters[start : start + _RUN], dtype), weights[start : start + _RUN]
        same = rounded.view(_bits(dtype)) == own.view(_bits(dtype))
        if not same.all():
            same |= (rounded == own) | (np.isnan(rounded) & np.isnan(own))  # signs of zeros, kinds of NaN
        if not same.all():
            at = int(np.argmin(same))
            first = first or f"{start + at} ({rounded[at]} and {own[at]})"
            wrong += int((~same).sum())
    if wrong:
        raise ConversionError(
            f"{name}: the master weight is not the module's weight: {wrong} of {masters.size} elements "
            f"differ when rounded to {dtype}, the first at {first}: the checkpoint was "
            f"saved wrongly, or is laid out in a way not known here; --set {SETTING}={TRUSTED} takes the master "
            "weights as they are"
        )


def _bits(dtype: str) -> str:
    return f"uint{numpy_dtype(dtype).itemsize * 8}"
