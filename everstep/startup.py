"""Normalises the environment of a process at its start.

Standard streams are open, failures to write output are ignored, signals work, and modules of the working folder do not
shadow Python's own.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys


def begin() -> None:
    """Call once, before any file is opened or module imported. Raises nothing."""
    _open_streams()
    _forget_first_path()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, the kernel would discard the status of children
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def _open_streams() -> None:
    """Open closed descriptors 0 to 2 on /dev/null: otherwise the next opened file would take their place."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
        if getattr(sys, name) is None:
            stream = open(fd, mode, errors="backslashreplace" if fd == 2 else None, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _forget_first_path() -> None:
    """Remove the script's or working folder from the path: a `queue.py` in it belongs to the user."""
    if not sys.flags.safe_path and sys.path:
        del sys.path[0]


class _Forgiving(io.TextIOWrapper):
    """A stream whose reader may disappear and whose disk may be full: output that cannot be written is dropped."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def forgive_errors() -> None:
    """Keep this process running when its standard error cannot be written: that must not end a job."""
    raw = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115
    encoding = sys.stderr.encoding
    sys.stderr = _Forgiving(raw, encoding, "backslashreplace", write_through=True)


def show_anything() -> None:
    """Show characters that the terminal's encoding lacks as `?`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def end(status: int) -> int:
    """Flush the output; returns the exit status. The reader of a pipe may have closed it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more at exit
        if not isinstance(error, BrokenPipeError):
            print(f"everstep: error: standard output: {error.strerror}", file=sys.stderr)
            return status or 2
    return status
