"""Two streams of tests side by side (`--claims`), each of which takes the next test that the other has not taken.

The first goes through the files from the front, the second from the back, until they meet: both take as long.
What depends on time is at the front, since the second stream runs at a lower priority.

`--cpu-times` shows the processor seconds of each file, with those of the processes that its tests started.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path

import psutil
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background: what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

_used_s: Counter[str] = Counter()  # file -> processor seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("streams")
    group.addoption("--claims", type=Path, help="a folder in which the streams of a run say what they have taken")
    group.addoption("--from-the-back", action="store_true", help="this is the second stream")
    group.addoption("--cpu-times", action="store_true", help="show the processor seconds of each file of tests")


class Claims:
    """The tests that this stream has taken. Those of one folder of `WHOLE` go together: they share costly fixtures.

    `LONG` files are the last: a stream that took one when the other has no more would end long after it.
    """

    WHOLE = ("tests/conversion",)
    LONG = ("tests/integration/test_compiling.py", "tests/integration/test_demo.py")

    def __init__(self, folder: Path, items: list[pytest.Item], backwards: bool) -> None:
        self._folder = folder
        parts = [(name, list(members)) for name, members in groupby(items, key=self._part)]
        parts.sort(key=lambda part: part[0] in self.LONG)
        self._parts = list(reversed(parts)) if backwards else parts

    def _part(self, item: pytest.Item) -> str:
        name = item.nodeid.partition("::")[0]
        return next((whole for whole in self.WHOLE if name.startswith(f"{whole}/")), name)

    def __iter__(self) -> Iterator[pytest.Item]:
        for name, members in self._parts:
            if name in self.WHOLE:
                if self._takes(name):
                    yield from members
            else:
                yield from (item for item in members if self._takes(item.nodeid))

    def _takes(self, name: str) -> bool:
        try:
            (self._folder / hashlib.sha256(name.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Count the processor seconds meanwhile, if asked to."""
    if not item.config.getoption("--cpu-times"):
        return (yield)
    before_s = _cpu_s()
    try:
        return (yield)
    finally:
        _used_s[item.nodeid.partition("::")[0]] += _cpu_s() - before_s


def _cpu_s() -> float:
    """Of this process and its children, living or waited for, with what those have waited for."""
    own = psutil.Process()
    used = sum(os.times()[:4])
    for child in own.children():
        try:
            used += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return used


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _used_s:
        terminalreporter.section("processor seconds")
        for name, used_s in [*_used_s.most_common(), ("all", _used_s.total())]:
            terminalreporter.write_line(f"{used_s:9.2f} {name}")
