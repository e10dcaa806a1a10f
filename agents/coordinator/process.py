"""A coordinator as a process: by itself (`everstep coordinator`), or beside a launcher, which starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from everstep.agents.base.patience import Wait
from everstep.agents.monitoring.pages import AddressTaken, PageServer
from everstep.agents.monitoring.story import Narrator, set_up_log
from everstep.agents.monitoring.web import routes
from everstep.comms.base.process import (
    SAME_S,
    STOPS,
    die_with_parent,
    leave_signals_to_launcher,
    own_command,
    rename_process,
)
from everstep.comms.base.security import Security, SecurityError
from everstep.elastic.contract.faults import COORDINATOR
from everstep.elastic.protocol.state import Config

from .etcd import (
    EtcdStore,
    JobOver,
    is_etcd,
    reach,
)
from .eventlog import harmless
from .held_store import HeldStore
from .orders import take_text
from .server import (
    NOBODY,
    Coordinator,
    NoSuchAddress,
    PortTaken,
)
from .store import (
    SqliteStore,
    StateStore,
    StateStoreError,
    Superseded,
)

log = logging.getLogger("everstep.coordinator")

START_S = 60.0  # until it serves
AGAIN_S, LATEST_S = 0.1, 5.0  # delay before a coordinator that never served is restarted: this, twice this, ...
END_S = 15.0
LOOK_S = 0.2
NOTICE_S = 3.0  # after a signal: nodes that got it too have requested the job's end within this time


@dataclass(frozen=True, kw_only=True)
class Task:
    """A coordinator's task; can be passed to another process."""

    job: str
    config: Config
    host: str
    port: int
    store: str  # a file, or etcd://HOST:PORT[,HOST:PORT...]
    behind: int = NOBODY  # see `Coordinator.serve`
    events: str = ""
    metrics: str = ""
    log: str = "off"  # one of story.LOGS
    stood_by: bool = False  # or led: then it ends when the job is over

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        raw = json.loads(text)
        return cls(**{**raw, "config": Config(**raw["config"])})


class CoordinatorFailed(Exception):
    """A coordinator that cannot serve: why, for the user. `taken`: its address is in use."""

    def __init__(self, why: str, *, taken: bool = False) -> None:
        super().__init__(why)
        self.taken = taken


class EndAsked:
    """Whether and when a signal requested that this process end."""

    def __init__(self) -> None:
        self.number = 0
        self.at_s = 0.0
        self._may_wait: Callable[[], bool] = lambda: False

    def listen(self) -> None:
        """To the signals that this process was not started to ignore."""
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._heard)

    def wait_while(self, condition: Callable[[], bool]) -> None:
        """From now on this process waits for the end of the job, if `condition` holds when the signal comes."""
        self._may_wait = condition

    def _heard(self, number: int, frame: Any) -> None:
        if self.number and time.monotonic() - self.at_s < SAME_S:
            return
        if self.number or not self._may_wait():
            os._exit(128 + number)
        self.number, self.at_s = number, time.monotonic()


def serve(task: Task, security: Security, on_ready: Callable[[int], None], asked: EndAsked) -> int:
    """Coordinate until the job is over, or the end is asked for; returns the exit status. Raises CoordinatorFailed.

    `on_ready` gets the port. The process gets its name when it leads.
    """
    if task.log != "off":
        set_up_log(task.log)
    try:
        while True:
            try:
                return asyncio.run(_serve(task, security, on_ready, asked))
            except Superseded as error:
                log.warning("%s", error)
                task = replace(task, stood_by=True)
    except PortTaken as error:
        raise CoordinatorFailed(f"{error} is in use", taken=True) from None
    except AddressTaken as error:
        raise CoordinatorFailed(f"--es-coordinator-metrics {error}") from None
    except (NoSuchAddress, StateStoreError, SecurityError) as error:
        raise CoordinatorFailed(str(error)) from None


async def _serve(task: Task, security: Security, on_ready: Callable[[int], None], asked: EndAsked) -> int:
    events = Path(task.events) if task.events else None
    coordinator = Coordinator(task.job, task.config, security, events=events)
    if task.log != "off":
        coordinator.listeners.news.append(harmless(Narrator(task.log).heard))
    pages: PageServer | None = None
    store: StateStore | None = None
    over = False
    try:
        port = await coordinator.serve(task.host, task.port, task.behind)
        if task.metrics:
            shown = routes(coordinator.observer, orders=bool(security.token))
            takers = {"/order": lambda text: take_text(text, coordinator.order)}
            pages = PageServer(task.metrics, shown, security, takers)
            print(f"everstep: the job can be watched: {pages.url} (metrics: /metrics)", file=sys.stderr, flush=True)
        if is_etcd(task.store):
            if not task.stood_by:
                await asyncio.to_thread(reach, task.store, security)  # the parent process gets the reason
            on_ready(port)
            store = await _elected(task, security, coordinator)
        else:
            store = SqliteStore(Path(task.store), task.job)
            on_ready(port)
        if store is None:
            return 0
        asked.wait_while(lambda: not coordinator.standing_by)
        lead = asyncio.create_task(coordinator.lead(store, lambda: rename_process(COORDINATOR)))
        over = await _is_over(lead, coordinator, asked)
        return 0 if over else 128 + asked.number
    finally:
        if pages is not None:
            pages.close()
        await coordinator.stop()
        if store is not None:
            await asyncio.to_thread(store.close, forget=over)


async def _is_over(lead: asyncio.Task[None], coordinator: Coordinator, asked: EndAsked) -> bool:
    """Serve until the job is over; False if a signal requests the end first and does not end the job too.

    The sender may have signalled every process of the job: then nodes are about to request a checkpoint, and need
    a coordinator until it is saved.
    """
    while not (await asyncio.wait({lead}, timeout=LOOK_S))[0]:
        ending = coordinator.state.stopping is not None or coordinator.state.leaving
        if asked.number and not ending and time.monotonic() - asked.at_s > NOTICE_S:
            lead.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await lead
            return False
    lead.result()
    return True


async def _elected(task: Task, security: Security, coordinator: Coordinator) -> StateStore | None:
    """The store, once this coordinator leads; None if the job was over before."""

    wait = Wait()

    def waits(why: str) -> None:
        coordinator.stand_by(why)
        if task.log != "off":
            wait.look(f"coordinator of job {task.job} stands by: {why}")

    def stand() -> EtcdStore:
        return EtcdStore(task.store, task.job, security, waits, stood_by=task.stood_by)

    try:
        return await asyncio.to_thread(stand)
    except JobOver:
        log.info("the job is over")
        return None


# ---------------------------------------------------------------- beside a launcher


class CoordinatorProcess:
    """A child that coordinates; when it dies it is started again, on the same address and with the same store."""

    def __init__(self, task: Task, security: Security) -> None:
        """Fork it: only before this process has threads. Raises CoordinatorFailed."""
        self._task, self._security = task, security
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None  # once it is not the fork any more
        self._store = None if is_etcd(task.store) else HeldStore(Path(task.store))
        self._pid, ready = self._fork()
        self.port = self._await(ready)
        here = task.behind == NOBODY
        self._task = replace(task, port=self.port) if here else replace(task, behind=self.port)
        self._watch = threading.Thread(target=self._keep_up, name="everstep-coordinating", daemon=True)
        self._watch.start()

    @property
    def pid(self) -> int:
        return self._pid

    def wait(self, timeout_s: float | None) -> bool:
        """Until it has ended, because the job has; whether that came in time."""
        self._watch.join(timeout_s)
        return not self._watch.is_alive()

    def close(self) -> None:
        """End it now."""
        self._ending.set()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._watch.join(END_S)

    def _fork(self) -> tuple[int, int]:
        ours, theirs = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            os.environ.update(self._security.environment())
            _child(self._task, theirs)  # does not return
        os.close(theirs)
        return pid, ours

    def _start(self) -> tuple[int, int]:
        """Start it as a new process, since this one has threads by now and cannot fork."""
        ours, theirs = os.pipe()
        command = own_command("everstep.agents.coordinator.process", str(theirs), self._task.to_json())
        environment = {**os.environ, **self._security.environment()}
        self._process = subprocess.Popen(command, pass_fds=[theirs], env=environment)
        os.close(theirs)
        return self._process.pid, ours

    def _wait(self) -> int:
        if self._process is not None:
            return self._process.wait()
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        except ChildProcessError:
            return 1  # waited for before: none could be started since

    def _await(self, ready: int) -> int:
        """The port it serves on. Raises CoordinatorFailed."""
        with os.fdopen(ready) as pipe:
            wait = Wait(f"this node waits for its coordinator to serve; it gives up after {START_S:g} s")
            deadline_s = time.monotonic() + START_S
            while not select.select([pipe], [], [], LOOK_S)[0]:
                wait.look()
                if time.monotonic() > deadline_s:
                    raise CoordinatorFailed(f"the coordinator does not serve after {START_S:g} s")
            line = pipe.readline()
        if not line:
            raise CoordinatorFailed("the coordinator ended before it served")
        answer: Mapping[str, Any] = json.loads(line)
        if "why" in answer:
            raise CoordinatorFailed(answer["why"], taken=answer["taken"])
        if self._store is not None:
            self._store.hold()
        return int(answer["port"])

    def _mend_store(self) -> None:
        """The store may have been deleted: a coordinator without it would take the job for a new one."""
        try:
            mended = self._store is not None and self._store.mend()
        except OSError as error:
            raise CoordinatorFailed(
                f"its store {self._task.store} was deleted, and cannot be written: {error}"
            ) from None
        if mended:
            print(
                f"everstep: warning: the coordinator's store {self._task.store} was deleted, and has been written "
                "again: give --es-store a file in a folder that is not cleaned",
                file=sys.stderr,
            )

    def _keep_up(self) -> None:
        failures = 0
        while True:
            status = self._wait()
            if self._ending.is_set() or status == 0:
                if self._store is not None:
                    self._store.close()
                return
            if self._ending.wait(min(AGAIN_S * 2**failures, LATEST_S) if failures else 0):
                return
            try:
                self._mend_store()
                self._pid, ready = self._start()
                if self._ending.is_set():
                    os.kill(self._pid, signal.SIGKILL)
                self._await(ready)
                failures = 0
            except CoordinatorFailed as error:
                failures += 1
                print(f"everstep: the coordinator is to be started again: {error}", file=sys.stderr)


def _child(task: Task, ready: int) -> None:
    """The life of a coordinator beside a launcher. Does not return."""
    die_with_parent()
    leave_signals_to_launcher()
    status = 1
    try:
        with os.fdopen(ready, "w", buffering=1) as pipe:
            security = Security.of(os.environ)

            def serves(port: int) -> None:
                pipe.write(json.dumps({"port": port}) + "\n")
                pipe.close()

            try:
                status = serve(task, security, serves, EndAsked())
            except CoordinatorFailed as error:
                if pipe.closed:
                    print(f"everstep: the coordinator: {error}", file=sys.stderr)
                else:
                    pipe.write(json.dumps({"why": str(error), "taken": error.taken}) + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Entry point of a child that is not a fork. Arguments: descriptor to report readiness on, task."""
    logging.basicConfig(format="everstep: %(message)s", level=logging.INFO)
    _child(Task.from_json(sys.argv[2]), int(sys.argv[1]))


if __name__ == "__main__":
    main()
