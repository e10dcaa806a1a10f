"""The preloaded process: imports torch, runs an optimizer once, and then forks workers that start at once.

A fresh interpreter takes seconds to its first optimizer step (torch alone imports for several); a fork of this
process takes milliseconds. The first one of a node is itself a fork of the launcher, which imports torch too. It stays
single-threaded, touches no device, and dies with its node agent; its forks die with it, and it ends their orphans
(`orphans.py`). Requests and answers are JSON datagrams on a socket pair; a request is a file, whose descriptor is sent
together with the worker's descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from everstep.comms.base.lasting import lasting
from everstep.comms.base.process import (
    STOPS,
    adopt_orphans,
    die_with_parent,
    leave,
    leave_signals_to_launcher,
    let_oom_killer_take_first,
    process_name,
    rename_process,
)
from everstep.elastic.contract.robust_mutex import hold
from everstep.elastic.contract.script_end import ended
from everstep.elastic.contract.settings import WorkerContext

from .compiler import defer_compiler, load_compiler
from .descriptors import out_of_the_way
from .forkable import thread_names, why_not
from .imports import Import
from .orphans import ENDED, GRACE_S, Orphans

WHY_BYTES = 4000  # of the reason in an answer; a datagram's size is limited
NAMED_S = 0.2  # within which a new thread has its name
NAMES = 100  # of processes, in one answer
SWEEP_S = 0.1  # while there are orphans
# What every worker imports later: to seed numpy, to resolve addresses, to save.
WANTED = ("numpy.random", "encodings.idna", "torch.utils.serialization.config")
OOM_THOUSANDTHS = 500  # before the keeper, whose memory a replacement needs, and the launcher, without which all end
NAME = "es-preloaded"  # of the process, as `ps` and `top` show it


class CannotPreload(Exception):
    """A module whose import makes working forks impossible. `module`: its name, if it was only found in the script."""

    def __init__(self, why: str, module: str = "") -> None:
        super().__init__(why)
        self.module = module


def warm_up(imports: Sequence[Import]) -> None:
    """Import what workers need and run an optimizer once; torch's compiler is imported on demand.

    Devices are not even counted: that initialises the driver, which forks cannot use then. So there is no backward
    pass, and no step of Adam, which counts devices. Nor does anything start threads, which forks would lack.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a module may ask; workers get their own environment
    import torch

    torch.set_num_threads(1)  # before the user's modules: threads of a pool do not exist in forks
    for module in ("everstep.elastic.api.decorator", *WANTED):
        importlib.import_module(module)
    for item in imports:
        _import_for_all(item)
    defer_compiler()
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _import_for_all(item: Import) -> None:
    """Import a module for the script. Raises CannotPreload if forks cannot work after it."""
    import torch

    threads = len(thread_names())
    _import(item)
    spoiled, until_s = why_not(), time.monotonic() + NAMED_S
    while not spoiled and len(thread_names()) > threads and time.monotonic() < until_s:
        time.sleep(0.01)
        spoiled = why_not()
    if not spoiled and len(thread_names()) > threads:
        if torch.get_num_threads() > 1:
            spoiled = f"it has made torch compute on {torch.get_num_threads()} threads"
        elif not item.asked:
            spoiled = "it has started threads"
    if spoiled and item.asked:
        raise CannotPreload(
            f"after the import of {item.module!r} no worker can be forked: {spoiled}, and a fork cannot use it. "
            "Leave the module out of --es-preload, and import it in the script"
        )
    if spoiled:
        raise CannotPreload(f"{spoiled}, which a fork cannot use", item.module)
    torch.set_num_threads(1)


def _import(item: Import) -> None:
    """As the script will do it: a name may be found when it is first looked up, or be a module. Raises ImportError."""
    try:
        module = importlib.import_module(item.module)
        for name in item.names:
            if not hasattr(module, name):
                importlib.import_module(f"{item.module}.{name}")
    except BaseException:
        if item.asked:
            raise  # else the script's own import says what is wrong, if it comes to that


class Preloaded:
    """Answers fork requests of one node agent until it goes away."""

    def __init__(
        self, channel: socket.socket, workers_name: str, imports: Sequence[Import], dispositions: dict[int, Any]
    ) -> None:
        self._channel = channel
        self._dispositions = dispositions  # of signals, in workers
        self._workers: set[int] = set()
        self._orphans = Orphans(self._workers.__contains__)
        self._imports = imports
        self._workers_name = workers_name
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        """Serve until the agent closes its end or dies. Workers and their orphans end with it."""
        self._tell({"kind": "ready"})
        while True:
            timeout_s = SWEEP_S if self._orphans.found else None
            readable, _, _ = select.select([self._channel, self._woken], [], [], timeout_s)
            if self._woken in readable:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()
            if (self._woken in readable or self._orphans.found) and (left := self._orphans.sweep()):
                self._tell({"kind": "left", "names": left[:NAMES]})
            if self._channel in readable:
                data, fds = self._receive()
                if not data:
                    self._end()
                    return
                with os.fdopen(fds.pop(0), "rb") as file:
                    file.seek(0)  # the position is the sender's too
                    request = json.load(file)
                self._fork(request, fds)

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, 16, 8)
        except ConnectionResetError:  # the agent is gone, and did not read the last message
            return b"", []
        return data, fds

    def _end(self) -> None:
        """The agent is gone: end its workers and their orphans."""
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._workers.clear()
        self._orphans.expect()
        if left := self._orphans.end_all(time.monotonic() + 2 * GRACE_S):
            with contextlib.suppress(OSError):  # the launcher may be gone, and the reader of its output
                print(ENDED.format(", ".join(left)), file=sys.stderr, flush=True)

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent is gone: the next read reports it
            self._channel.send(json.dumps(message).encode())

    def _reap(self) -> None:
        while True:
            try:
                end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if end is None:
                return
            if end.si_pid in self._workers:
                self._workers.discard(end.si_pid)
                status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                self._tell({"kind": "exited", "pid": end.si_pid, "status": status})
                self._orphans.expect()
            os.waitpid(end.si_pid, 0)  # only now: until the report is sent, /proc has the status

    def _fork(self, request: dict[str, Any], fds: list[int]) -> None:
        if request["environment"]["TORCHELASTIC_RESTART_COUNT"] != "0":
            load_compiler()  # an ordinary script, started over and over: its DDP needs it each time
        if spoiled := why_not():
            imported = ", ".join(item.module for item in self._imports) or "torch"
            raise CannotPreload(f"no worker can be forked any more: {spoiled} since the import of {imported}")
        pid = os.fork()
        if pid == 0:
            self._become_worker(request, fds)
        self._workers.add(pid)
        for fd in fds:
            os.close(fd)
        self._tell({"kind": "forked", "rank": request["rank"], "incarnation": request["incarnation"], "pid": pid})

    def _become_worker(self, request: dict[str, Any], fds: list[int]) -> None:
        code = 1
        try:
            hold(fds[1])
            die_with_parent()
            let_oom_killer_take_first(OOM_THOUSANDTHS)
            os.setsid()  # like torchrun: signals of a terminal or a shell reach only the launcher
            adopt_orphans()
            rename_process(self._workers_name)
            signal.set_wakeup_fd(-1)
            for number, handler in self._dispositions.items():
                signal.signal(number, handler)
            for end in (self._channel, self._wake, self._woken):
                end.close()
            self._redirect(request)
            _print_by_lines()
            os.environ.clear()
            os.environ.update(request["environment"])
            control, progress = map(out_of_the_way, fds)
            context = replace(WorkerContext.of(os.environ), control_fd=control, progress_fd=progress)
            os.environ.update(context.to_environment())
            _seed_numpy()
            _bind(*request["numa"])
            code = run_program(request["program"])
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def _redirect(request: dict[str, Any]) -> None:
        for path, stream in ((request["stdout"], 1), (request["stderr"], 2)):
            if path:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(fd, stream)
                os.close(fd)


def _seed_numpy() -> None:
    """As where a process imports it: else all forks would draw the same numbers. Python seeds its own after a fork."""
    import numpy.random

    numpy.random.seed()


def _bind(mode: str, gpu: int) -> None:
    """Torchrun's --numa-binding: all threads of this process to the processors near a GPU."""
    if mode:
        from torch.numa import binding

        options = binding.NumaOptions(affinity_mode=binding.AffinityMode(mode))
        binding._maybe_wrap_with_numa_binding(lambda: None, gpu_index=gpu, numa_options=options)()


def _print_by_lines() -> None:
    """Have this process write each line as soon as it is whole, and in one piece.

    Torchrun starts workers with `python -u`, with which `print` writes each of its arguments on its own, so that the
    lines of ranks that share a stream are mixed.
    """
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)  # as PYTHONIOENCODING and the locale have it
        raw = open(fd, "wb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(raw, before.encoding, before.errors, line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run_program(program: dict[str, Any]) -> int:
    """Run the user's script, module or command in this process; returns its exit status."""
    kind, target, arguments = program["kind"], program["target"], program["arguments"]
    if kind == "command":
        try:
            os.execvp(target, [target, *arguments])
        except OSError as error:
            print(f"everstep: error: cannot run {target}: {error.strerror}", file=sys.stderr)
            return 127
    sys.argv = [target, *arguments]
    raised = _raised(lambda: _run_script(kind, target))
    raised = _raised(lambda: ended(raised)) or raised
    code = 0
    if isinstance(raised, SystemExit):
        code = _exit_status(raised)
    elif raised is not None:
        traceback.print_exception(raised)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


def _run_script(kind: str, target: str) -> None:
    if kind == "module":
        _set_first_path(os.getcwd())
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    elif os.path.isdir(target) or zipfile.is_zipfile(target):
        runpy.run_path(os.path.abspath(target), run_name="__main__")  # which puts it first in the path
    else:
        _set_first_path(os.path.dirname(os.path.realpath(target)))
        runpy.run_path(target, run_name="__main__")


def _raised(function: Callable[[], None]) -> BaseException | None:
    """What a function raises, with the traceback that begins in the user's code; None if it returns."""
    try:
        function()
    except BaseException as error:
        return error.with_traceback(_users_part(error.__traceback__))
    return None


def _set_first_path(folder: str) -> None:
    """The first entry of sys.path, as `python script.py` and `python -m module` set it."""
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, folder)


def _exit_status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of this launcher and of runpy."""
    while trace is not None and (
        trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__)
        or trace.tb_frame.f_code.co_filename.startswith("<frozen")
    ):
        trace = trace.tb_next
    return trace


def _dispositions() -> dict[int, Any]:
    """Dispositions of signals as in a child of this process's parent: signals ignored here stay ignored."""
    found: dict[int, Any] = {signal.SIGCHLD: signal.SIG_DFL}
    for number in STOPS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        found[number] = signal.SIG_IGN if signal.getsignal(number) == signal.SIG_IGN else default
    return found


def serve(channel: socket.socket, imports: Sequence[Import]) -> NoReturn:
    """Become the preloaded process: warm up and serve."""
    status = 1
    try:
        die_with_parent()
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        adopt_orphans()
        dispositions = _dispositions()
        leave_signals_to_launcher()
        name = process_name()
        rename_process(NAME)
        with lasting():
            warm_up(imports)
        die_with_parent(signal.SIGCONT)  # from now on the channel reports the agent's end, and orphans have to be ended
        Preloaded(channel, name, imports, dispositions).serve()
        status = 0
    except (ImportError, CannotPreload) as error:
        told = {"kind": "failed", "why": str(error)[:WHY_BYTES], "module": getattr(error, "module", "")}
        channel.send(json.dumps(told).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        leave(status)


if __name__ == "__main__":  # python -m everstep.agents.node.preload FD IMPORTS
    serve(socket.socket(fileno=int(sys.argv[1])), [Import(*fields) for fields in json.loads(sys.argv[2])])
