"""Sums of floats without rounding, so that the result does not depend on the order of the addends.

Every finite float64 is an integer times a power of two, and integers add without error in any order and grouping. One
rounding at the end gives the correctly rounded sum, whichever rank held which addend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_LEAST = 1074  # the smallest positive float64 is 2 ** -1074
_NAN, _PLUS, _MINUS = 1, 2, 4


@dataclass(frozen=True)
class ExactSum:
    """mantissa * 2 ** exponent, the mantissa odd or 0: one form for each value. At most 270 bytes for 2 ** 40 floats.

    `special` is a bit set of the non-finite addends: 1 NaN, 2 infinity, 4 minus infinity.
    """

    mantissa: int = 0
    exponent: int = 0
    special: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> ExactSum:
        """The sum of some floats."""
        units = special = 0
        for value in values:
            if math.isfinite(value):
                numerator, denominator = value.as_integer_ratio()
                units += numerator << (_LEAST + 1 - denominator.bit_length())
            else:
                special |= _NAN if math.isnan(value) else _PLUS if value > 0 else _MINUS
        return _normal(units, -_LEAST, special)

    def __add__(self, other: ExactSum) -> ExactSum:
        exponent = min(self.exponent, other.exponent)
        mine, its = self.mantissa << (self.exponent - exponent), other.mantissa << (other.exponent - exponent)
        return _normal(mine + its, exponent, self.special | other.special)

    def rounded(self) -> float:
        """The float64 nearest to the sum (ties to even); NaN and infinities follow IEEE 754."""
        if self.special:
            return {_PLUS: math.inf, _MINUS: -math.inf}.get(self.special, math.nan)
        try:  # integer division and conversion both round correctly
            if self.exponent >= 0:
                return float(self.mantissa << self.exponent)
            return self.mantissa / (1 << -self.exponent)
        except OverflowError:
            return math.inf if self.mantissa > 0 else -math.inf


NOTHING = ExactSum()  # the empty sum


def _normal(mantissa: int, exponent: int, special: int) -> ExactSum:
    if not mantissa:
        return ExactSum(0, 0, special)
    zeros = (mantissa & -mantissa).bit_length() - 1
    return ExactSum(mantissa >> zeros, exponent + zeros, special)
