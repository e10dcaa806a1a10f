"""Boxes in a tensor's coordinates: which of many meet a given one, and where. Looked up, for there may be thousands."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Generic, Protocol, TypeVar

Point = tuple[int, ...]


class Box(Protocol):
    @property
    def offsets(self) -> Point: ...

    @property
    def sizes(self) -> Point: ...


B = TypeVar("B", bound=Box)


class Boxes(Generic[B]):
    """Boxes that do not overlap, sorted by their offsets on the first two axes, such as layers and experts."""

    def __init__(self, boxes: Iterable[B]) -> None:
        self._boxes = sorted(boxes, key=lambda box: box.offsets)
        self._begins = [box.offsets[:2] for box in self._boxes]
        axes = len(self._begins[0]) if self._begins else 0
        self._longest = [max(box.sizes[axis] for box in self._boxes) for axis in range(axes)]

    def __iter__(self) -> Iterator[B]:
        return iter(self._boxes)

    def meeting(self, offsets: Point, sizes: Point) -> Iterator[tuple[B, list[tuple[int, int]], tuple[slice, ...]]]:
        """(box, ranges within that box, slices within the given one) for every box that meets the given one."""
        for box in self._near(offsets, sizes):
            low = [max(a, b) for a, b in zip(offsets, box.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, box.offsets, box.sizes, strict=True)]
            if all(begin < end for begin, end in zip(low, high, strict=True)):
                within = [(a - o, b - o) for a, b, o in zip(low, high, box.offsets, strict=True)]
                yield box, within, tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))

    def beginning(self, prefix: Point) -> list[B]:
        """The boxes whose offsets start with these, in order."""
        begin = bisect_left(self._begins, prefix[:2])
        near = (self._boxes[at] for at in range(begin, len(self._boxes)))
        return list(takewhile(lambda box: box.offsets[: len(prefix)] == prefix, near))

    def _near(self, offsets: Point, sizes: Point) -> list[B]:
        """The boxes that may intersect the given box, by their first axes."""
        if not self._longest:
            return self._boxes
        first: Point = (offsets[0] - self._longest[0] + 1,)
        last: Point = (offsets[0] + sizes[0],)
        if len(self._longest) > 1 and self._longest[0] == sizes[0] == 1:
            first = (offsets[0], offsets[1] - self._longest[1] + 1)
            last = (offsets[0], offsets[1] + sizes[1])
        return self._boxes[bisect_left(self._begins, first) : bisect_left(self._begins, last)]
