"""A keeper's handle on its saver, which is a process of its own (`saver.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from typing import Any

from everstep.comms.base.process import let_compute_go_first, own_command

from .request import SaveRequest

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
