"""Ranks of one process, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

HANG_S = 30


def at_once(ranks: Sequence[Any], act: Callable[[Any], Any]) -> list[Any]:
    """The results of `act` on all ranks, in their order, run concurrently; raises what any of them raises."""
    results: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            results[number] = act(ranks[number])
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert len(results) == len(threads), f"only ranks {sorted(results)} are through"
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[number] for number in range(len(ranks))]
