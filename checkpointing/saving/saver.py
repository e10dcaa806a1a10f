"""The saver: a process beside a node's keeper that writes checkpoints from what the keeper holds.

Apart from the workers, so that training never waits for storage; apart from the keeper, so that a storage library that
hangs or grows takes nothing along. Requests come as lines on standard input, what became of them goes to standard
output. It ends with its keeper.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from everstep.checkpointing.access.client import KeeperClient, KeeperRefused
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.store import StoreError
from everstep.comms.base.process import leave_signals_to_launcher, let_compute_go_first, own_command
from everstep.resharding.lines import Lines

from .part import (
    Gone,
    SaveRequest,
    save_part,
    saved_bytes,
)

WRITERS = 2  # requests that are carried out at the same time: those of the node's workers
MOVED_S = 1.0  # between words of progress
REMEMBERED = 64  # results that no worker has fetched


class Saver:
    """A keeper's handle on its saver process: starts it on demand, and collects the results."""

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token
        self._lock = threading.Lock()
        self._feeding = threading.Lock()  # held while a pipe may block; `results` does not need it
        self._process: subprocess.Popen[bytes] | None = None
        self._open: dict[tuple[str, str], float] = {}  # (writer, name) under way -> when it made progress last
        self._results: dict[str, list[dict[str, Any]]] = {}  # writer -> unfetched results

    def save(self, request: SaveRequest) -> None:
        """Start saving; `results` reports the outcome."""
        with self._lock:
            if (request.writer, request.name) in self._open:
                return  # a retry after the worker had lost its connection
            self._open[(request.writer, request.name)] = time.monotonic()
        threading.Thread(target=self._feed, args=(request,), name="everstep-save", daemon=True).start()

    def _feed(self, request: SaveRequest) -> None:
        let_compute_go_first()
        try:
            with self._feeding:
                process = self._process or self._start()
                assert process.stdin is not None
                process.stdin.write(request.to_json().encode() + b"\n")
                process.stdin.flush()
        except OSError as error:
            with self._lock:
                self._end(request.writer, {"name": request.name, "error": f"the saver cannot run: {error}"})

    def _start(self) -> subprocess.Popen[bytes]:
        command = own_command("everstep.checkpointing.saving.saver", self._address)
        environment = {**os.environ, "EVERSTEP_TOKEN": self._token}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._process = process
        threading.Thread(target=self._listen, args=(process,), name="everstep-saver", daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            result = json.loads(line)
            with self._lock:
                if self._process is not process:
                    continue  # it was abandoned
                if result.get("moved"):
                    self._move(result["writer"], result["name"])
                else:
                    self._end(result.pop("writer"), result)
        status = process.wait()
        with self._lock:
            if self._process is not process:
                return
            self._process = None
            for writer, name in list(self._open):
                why = f"the process that saves it ended with status {status}"
                self._end(writer, {"name": name, "error": why, "lost": True})

    def _move(self, writer: str, name: str) -> None:
        if (writer, name) in self._open:
            self._open[(writer, name)] = time.monotonic()

    def abandon(self, writer: str, name: str) -> None:
        """The storage does not respond: end the process that waits for it; the next save starts a new one."""
        with self._lock:
            if self._open.pop((writer, name), None) is None or self._process is None:
                return
            process, self._process = self._process, None
            process.kill()  # where it waits in the kernel, it ends when that lets it
            for other, theirs in list(self._open):
                why = f"the process that saves it was ended, since {name} made no progress"
                self._end(other, {"name": theirs, "error": why, "lost": True})

    def _end(self, writer: str, result: dict[str, Any]) -> None:
        self._open.pop((writer, result["name"]), None)
        waiting = self._results.setdefault(writer, [])
        waiting.append({"seconds": 0.0, "bytes": 0, "committed": False, "error": "", **result})
        del waiting[:-REMEMBERED]

    def results(self, writer: str) -> dict[str, Any]:
        """{"results": saves that ended since the last call, "open": names of unfinished saves, "still_s"}.

        "still_s": for how long the unfinished saves have made no progress.
        """
        with self._lock:
            now = time.monotonic()
            still_s = {name: now - moved_s for (who, name), moved_s in self._open.items() if who == writer}
            return {"results": self._results.pop(writer, []), "open": list(still_s), "still_s": still_s}


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
