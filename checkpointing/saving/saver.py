"""The saver: a process beside a node's keeper that writes checkpoints from what the keeper holds.

Apart from the workers, so that training never waits for storage; apart from the keeper, so that a storage library that
hangs or grows takes nothing along. Requests come as lines on standard input, what became of them goes to standard
output. It ends with its keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from everstep.checkpointing.access.client import KeeperClient, KeeperRefused
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.store import StoreError
from everstep.comms.base.process import leave_signals_to_launcher
from everstep.resharding.lines import Lines

from .part import Gone, save_part, saved_bytes
from .request import SaveRequest

WRITERS = 2  # requests that are carried out at the same time: those of the node's workers
MOVED_S = 1.0  # between words of progress


def _fetcher(address: str, token: str, version: int, lines: Lines) -> Any:
    """A function that fetches records at `version` from the keeper, over a separate connection."""
    client = KeeperClient(address, token)

    def fetch(shards: Sequence[int]) -> Mapping[int, bytearray]:
        found, _ = client.fetch(list(shards), version, replay=False, lines=lines)
        return {item.shard: item.parts[0] for item in found}

    return client, fetch


def _carry_out(request: SaveRequest, address: str, token: str, moved: Callable[[], None]) -> dict[str, Any]:
    started = time.monotonic()
    result: dict[str, Any] = {"writer": request.writer, "name": request.name, "warnings": []}
    try:
        client, fetch = _fetcher(address, token, request.version, request.lines)
        with contextlib.closing(client):
            result["committed"] = save_part(request, fetch, moved=moved, warned=result["warnings"].append)
        result["bytes"] = saved_bytes(request) if result["committed"] else 0
    except (StoreError, CheckpointError, Gone, KeeperRefused, OSError, ValueError) as error:
        result["error"] = str(error)
    return {**result, "seconds": time.monotonic() - started}


def main() -> None:
    """Run a saver for the keeper at the address given; ends with its standard input."""
    leave_signals_to_launcher()
    address, token = sys.argv[1], os.environ.pop("EVERSTEP_TOKEN")
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        with lock:
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()

    def one(line: bytes) -> None:
        request, told_s = SaveRequest.from_json(line), 0.0

        def moved() -> None:
            nonlocal told_s
            if time.monotonic() - told_s > MOVED_S:
                told_s = time.monotonic()
                tell({"writer": request.writer, "name": request.name, "moved": True})

        tell(_carry_out(request, address, token, moved))

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="everstep-save") as pool:
        for line in sys.stdin.buffer:
            pool.submit(one, line)
        os._exit(0)  # the keeper is gone: there is nothing left to save from


if __name__ == "__main__":
    main()
