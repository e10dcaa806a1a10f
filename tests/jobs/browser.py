"""A headless Chromium, driven by its own protocol (chromedevtools.github.io/devtools-protocol) over a web socket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from everstep.comms.base.process import die_with_parent

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
START_S = 30.0
COMMAND_S = 20.0


class Browser:
    """One page. Its errors and warnings are in `complaints`."""

    def __init__(self, folder: Path, width: int = 1100, height: int = 1500, *, dark: bool = False) -> None:
        assert CHROMIUM is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}/chromium", f"--window-size={width},{height}"]
        flags += [
            "--disable-background-networking",
            "--disable-sync",
            "--disable-component-update",
            "--no-proxy-server",
        ]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._run(self._connect(self._debugger()))
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def _debugger(self) -> str:
        """The address of its remote control interface, read from its standard error."""
        assert self._process.stderr is not None
        deadline = time.monotonic() + START_S
        for line in self._process.stderr:
            if "DevTools listening on " in line:
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return line.split()[-1]
            assert time.monotonic() < deadline, "chromium does not start"
        raise AssertionError("chromium ended")

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        pages = "http://" + address.split("/")[2] + "/json/list"
        while True:
            async with self._session.get(pages) as answer:
                found = [page for page in await answer.json() if page["type"] == "page"]
            if found:
                break
            await asyncio.sleep(0.05)
        self._socket = await self._session.ws_connect(found[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        return dict(self._run(asyncio.wait_for(self._ask(method, parameters), COMMAND_S)))

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, parameters = message["method"], message["params"]
        if method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.complaints.append(str(parameters["args"]))

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = 20.0) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.05)
        return found

    def screenshot(self, path: Path, *, height: int = 0) -> None:
        height = height or int(self.value("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": self.value("innerWidth"), "height": height, "scale": 1}
        data = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._run(self._socket.close())
        self._run(self._session.close())
        self._loop.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()


@contextlib.contextmanager
def browser(folder: Path, **settings: Any) -> Iterator[Browser]:
    """A browser, ended at the end."""
    found = Browser(folder, **settings)
    try:
        yield found
    finally:
        found.close()
