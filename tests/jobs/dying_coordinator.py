"""`everstep coordinator` that kills itself at a decision with orders: just before it is written, or just after, when
no agent has received it. The first argument is `before` or `after`; the rest are the command's own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from everstep.agents.coordinator.store import SqliteStore
from everstep.cli import main

_commit = SqliteStore.commit


def _deadly(store: SqliteStore, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
    orders = any(name.startswith("order/") and data is not None for name, data in rows.items())
    if not orders or WHEN == "after":
        _commit(store, rows, sync=sync)
    if orders:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    WHEN = sys.argv.pop(1)
    SqliteStore.commit = _deadly  # type: ignore[method-assign]
    sys.exit(main(["coordinator", *sys.argv[1:]]))
