"""Two streams of tests side by side (`--claims`), each of which takes the next file that the other has not taken.

The first goes through the files from the front, the second from the back, until they meet: both take as long.
What depends on time is at the front, since the second stream runs at a lower priority.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background: what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("streams")
    group.addoption("--claims", type=Path, help="a folder in which the streams of a run say what they have taken")
    group.addoption("--from-the-back", action="store_true", help="this is the second stream")


class Claims:
    """The files that this stream has taken. Those of one folder of `WHOLE` go together: they share costly fixtures."""

    WHOLE = ("tests/conversion",)

    def __init__(self, folder: Path, items: list[pytest.Item], backwards: bool) -> None:
        self._folder = folder
        parts = [(name, list(members)) for name, members in groupby(items, key=self._part)]
        self._parts = list(reversed(parts)) if backwards else parts

    def _part(self, item: pytest.Item) -> str:
        name = item.nodeid.partition("::")[0]
        return next((whole for whole in self.WHOLE if name.startswith(f"{whole}/")), name)

    def __iter__(self) -> Iterator[pytest.Item]:
        for name, members in self._parts:
            try:
                (self._folder / name.replace("/", "-")).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield from members


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own, but for what the other stream has taken."""
    folder: Path | None = session.config.getoption("--claims")
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None
    items = iter(Claims(folder, session.items, session.config.getoption("--from-the-back")))
    item = next(items, None)
    while item is not None:
        following = next(items, None)  # taken while this one runs: whose fixtures are still needed has to be known
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True
