"""`everstep convert`, `inspect`, `verify` and `diff`: checkpoints on the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np

from .agents.base.strict_json import dumps
from .checkpointing.convert.core.content import Content, ConversionError, Lazy
from .checkpointing.convert.core.format import (
    MODULES,
    READ_ONLY,
    READ_SETTINGS,
    Options,
)
from .checkpointing.convert.core.work import NOBODY, WorkWatch
from .checkpointing.convert.drive import driver
from .checkpointing.universal.manifest import CheckpointError, path_of
from .checkpointing.universal.reader import open_checkpoint
from .checkpointing.universal.store import StoreError

FORMATS = ("universal", *MODULES)
TARGETS = tuple(name for name in FORMATS if name not in READ_ONLY)
BUDGET_MIB = driver.DEFAULT_BUDGET_BYTES >> 20


class _Failed(Exception):
    """An error that is reported to the user."""


def _options(text: list[str]) -> dict[str, str]:
    found = {}
    for item in text:
        name, separator, value = item.partition("=")
        if not separator:
            raise _Failed(f"--set {item}: expected NAME=VALUE")
        found[name] = value
    return found


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; a user's mistake, or a damaged checkpoint, is reported on one line."""
    try:
        status = command(arguments)
        sys.stdout.flush()
        return status
    except (_Failed, ConversionError, CheckpointError, StoreError) as error:
        _tell("error", str(error))
        return 1
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _tell("error", "interrupted; run the same conversion again to continue it")
        return 128 + signal.SIGINT


def _tell(kind: str, text: str) -> None:
    print(f"everstep: {kind}: {_line(text)}", file=sys.stderr)


def _line(text: str) -> str:
    """Text as one line without control characters: names in checkpoints may contain any character."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# ---------------------------------------------------------------- convert


def convert(arguments: list[str]) -> int:
    """Convert a checkpoint from one format to another."""
    return _run(_convert, arguments)


def _convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep convert", description=convert.__doc__)
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or the URL of a universal checkpoint")
    parser.add_argument("destination", metavar="DST", help="what is made: a folder, or a URL with --to universal")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--from", dest="origin", default="", choices=FORMATS, help="found out if not given")
    parser.add_argument("--rules", action="append", default=[], metavar="FILE", help="how shards make tensors")
    parser.add_argument(
        "--names", default="", metavar="FILE", help="change names by these rules: a file, or llama, qwen2, qwen3, gpt2"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of a format")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out what is not understood, by name (*, ?)",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read again what was written")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument("--dry-run", action="store_true", help="do all but write")
    parser.add_argument("--explain", action="store_true", help="print what becomes of every tensor, and by which rule")
    parser.add_argument("--threads", type=int, default=0, help="that read and write at the same time")
    parser.add_argument("--memory", type=int, default=BUDGET_MIB, metavar="MIB", help="for tensors under way")
    given = parser.parse_args(arguments)
    limits = {"threads": given.threads} if given.threads > 0 else {}
    conversion = driver.Conversion(
        source=given.source,
        destination=given.destination,
        to=given.to,
        origin=given.origin,
        rules=tuple(given.rules),
        names=given.names,
        settings=_options(given.set),
        drop=tuple(given.drop),
        verify=not given.no_verify,
        force=given.force,
        budget_bytes=max(1, given.memory) << 20,
        **limits,
    )
    content = driver.prepare(conversion)
    for warning in content.warnings:
        _tell("warning", warning)
    for reason in dict.fromkeys(why for _, why in content.dropped):
        _tell("left out", f"{', '.join(name for name, why in content.dropped if why == reason)} ({reason})")
    if content.other:
        _tell("kept beside the model", ", ".join(content.other))
    if given.explain:
        for line in driver.explain(content):
            print(_line(line))
    if given.dry_run:
        driver.check_free(conversion)
        print(f"would write {_summary(content)} to {given.destination}", file=sys.stderr)
        return 0
    with _progress() as watch:
        driver.convert(conversion, content, watch)
    print(f"wrote {_summary(content)} to {given.destination}", file=sys.stderr)
    return 0


def _summary(content: Content) -> str:
    tensors = list(content.tensors())
    size = sum(tensor.nbytes for _, _, tensor in tensors)
    return f"step {content.step}: {len(content.params)} parameters, {len(tensors)} tensors, {_bytes(size)}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


@contextlib.contextmanager
def _progress(stream: TextIO | None = None) -> Iterator[WorkWatch]:
    """A progress bar, if the output is a terminal."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield NOBODY
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("", total=0)
        lock = threading.Lock()

        def planned(nbytes: int) -> None:
            with lock:
                bar.update(task, total=(bar.tasks[0].total or 0) + nbytes)

        yield WorkWatch(planned, lambda piece: bar.advance(task, piece.nbytes))


# ---------------------------------------------------------------- inspect


def inspect(arguments: list[str]) -> int:
    """The contents of a checkpoint of any format: names, shapes, types, sizes, step."""
    return _run(_inspect, arguments)


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep inspect", description=inspect.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--from", dest="origin", default="", choices=FORMATS)
    _add_reading(parser)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    origin, content = _read(given.checkpoint, given.origin, given)
    found = _described(given.checkpoint, origin, content)
    if given.json:
        print(dumps(found))
        return 0
    print(f"{given.checkpoint}: {origin}, {_summary(content)}")
    for warning in content.warnings:
        _tell("warning", warning)
    for key in ("run", "data", "optimizer", "tied", "unknown"):
        if found.get(key):
            print(f"  {key}: {dumps(found[key])}")
    for line in _tree(_nested(found["tensors"])):
        print(_line(line))
    return 0


_Branch = dict[str, Any]  # "name." -> its branch, "name" -> the description of a tensor


def _nested(tensors: list[dict[str, Any]]) -> _Branch:
    root: _Branch = {}
    for tensor in tensors:
        at = root
        parts = f"{tensor['room'].replace('/', '.')}.{tensor['name']}".split(".")
        for part in parts[:-1]:
            at = at.setdefault(f"{part}.", {})
        at[parts[-1]] = tensor
    return root


def _tree(branch: _Branch, indent: str = "  ") -> Iterator[str]:
    """Lines of a tree; a node with a single child shares a line with it."""
    for name, below in branch.items():
        if not name.endswith("."):
            yield f"{indent}{name}  {_told(below)}"
            continue
        while len(below) == 1 and next(iter(below)).endswith("."):
            name += next(iter(below))
            below = below[next(iter(below))]
        yield f"{indent}{name.removesuffix('.')}"
        yield from _tree(below, indent + "  ")


def _told(tensor: dict[str, Any]) -> str:
    text = f"{tensor['dtype']} {'x'.join(map(str, tensor['shape'])) or 'scalar'}  {_bytes(tensor['bytes'])}"
    if "checksums" not in tensor:
        return f"{text}  from {tensor['origin']}"
    sums = tensor["checksums"]
    chunks = "x".join(map(str, tensor["chunk"])) or "scalar"
    return f"{text}  {len(sums)} x {chunks}  xxh3 {' '.join(sums[:1])}{' ...' if len(sums) > 1 else ''}"


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", action="append", default=[], metavar="FILE", help="how shards make tensors")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of a format")


def _read(where: str, origin: str, given: argparse.Namespace) -> tuple[str, Content]:
    """The format of a checkpoint, and its contents."""
    rules, settings = tuple(driver.rule_path(rule) for rule in given.rules), _options(given.set)
    driver.check_settings(settings, [name for names in READ_SETTINGS.values() for name in names])
    origin = driver.format_of(where, origin)
    return origin, driver.read(where, origin, Options(rules=rules, settings=settings))


def _described(where: str, origin: str, content: Content) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    for room, name, tensor in content.tensors():
        entry = {
            "path": f"{room}/{name}",
            "room": room,
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
        }
        tensors.append({**entry, "origin": tensor.origin})
    scalars = {
        state: {name: scalar.value for name, scalar in values.items()} for state, values in content.scalars.items()
    }
    found: dict[str, Any] = {"checkpoint": where, "format": origin, "step": content.step, "tied": content.tied}
    found |= {"scalars": scalars, "dtypes": content.dtypes, "layers": content.layers, "tensors": tensors}
    found |= {"unknown": content.unknown, "warnings": content.warnings}
    found["left_out"] = [{"name": name, "why": why} for name, why in content.dropped]
    found["bytes"] = sum(tensor["bytes"] for tensor in tensors)
    if origin == driver.UNIVERSAL:
        checkpoint = open_checkpoint(where)
        manifest = checkpoint.manifest
        described: dict[str, Any]
        for described in tensors:
            array = manifest.arrays[path_of(described["room"], described["name"])]
            described |= {"chunk": list(array.chunk), "checksums": list(array.checksums)}
        found |= {"url": checkpoint.url, "run": manifest.run, "data": manifest.data, "optimizer": manifest.optimizer}
        found["saved_at"] = manifest.saved_at
    return found


# ---------------------------------------------------------------- verify


def verify(arguments: list[str]) -> int:
    """Check every file of a universal checkpoint against its manifest. Exit status 1 if a file is wrong or missing."""
    return _run(_verify, arguments)


def _verify(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep verify", description=verify.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    checkpoint = open_checkpoint(given.checkpoint)
    sizes: list[int] = []
    problems = list(checkpoint.verify(sizes.append))
    if given.json:
        found = {"checkpoint": checkpoint.url, "step": checkpoint.manifest.step, "files": len(sizes)}
        print(dumps({**found, "bytes": sum(sizes), "problems": problems}))
    else:
        for problem in problems:
            print(_line(problem))
        verdict = f"{len(problems)} problems" if problems else "whole"
        print(f"{checkpoint.url}: step {checkpoint.manifest.step}, {len(sizes)} files, {_bytes(sum(sizes))}: {verdict}")
    return 1 if problems else 0


# ---------------------------------------------------------------- diff


def diff(arguments: list[str]) -> int:
    """Compare two checkpoints, of any formats. Exit status 1 if they differ."""
    return _run(_diff, arguments)


def _diff(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep diff", description=diff.__doc__)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--params", action="store_true", help="compare parameters alone, not the optimizer's state")
    _add_reading(parser)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    sides = [_read(where, "", given)[1] for where in (given.a, given.b)]
    rows = list(_differences(*sides, only_params=given.params))
    others = [] if given.params else list(_other_differences(*sides))
    same = sum(row["equal"] for row in rows)
    equal = same == len(rows) and not others
    if given.json:
        print(dumps({"a": given.a, "b": given.b, "equal": equal, "tensors": rows, "others": others}))
    else:
        for row in [*rows, *others]:
            if not row["equal"]:
                print(_line(f"{row['path']}: {row['why']}"))
        print(f"{same} of {len(rows)} tensors are equal, bit for bit")
    return 0 if equal else 1


def _differences(a: Content, b: Content, *, only_params: bool) -> Iterator[dict[str, Any]]:
    ours, theirs = ({(room, name): tensor for room, name, tensor in side.tensors()} for side in (a, b))
    for room, name in sorted(ours.keys() | theirs.keys()):
        if only_params and room != "params":
            continue
        yield {"path": f"{room}/{name}", **_compared(ours.get((room, name)), theirs.get((room, name)))}


def _other_differences(a: Content, b: Content) -> Iterator[dict[str, Any]]:
    """The differences besides tensors: the step, numbers of the optimizer, tied parameters."""
    if a.step != b.step:
        yield {"path": "step", "equal": False, "why": f"{a.step} and {b.step}"}
    numbers = [
        {
            f"scalars/{state}/{name}": number.value
            for state, values in side.scalars.items()
            for name, number in values.items()
        }
        | {f"tied/{alias}": owner for alias, owner in side.tied.items()}
        for side in (a, b)
    ]
    for path in sorted(numbers[0].keys() | numbers[1].keys()):
        ours, theirs = (side.get(path, "nothing") for side in numbers)
        if ours != theirs:
            yield {"path": path, "equal": False, "why": f"{ours} and {theirs}"}


def _compared(a: Lazy | None, b: Lazy | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"equal": False, "why": "only in B" if a is None else "only in A"}
    if a.shape != b.shape:
        return {"equal": False, "why": f"shape {list(a.shape)} and {list(b.shape)}"}
    x, y = a.read(), b.read()
    if a.dtype == b.dtype and x.tobytes() == y.tobytes():
        return {"equal": True, "why": "", "max_difference": 0.0}
    wide = np.complex128 if x.dtype.kind == "c" or y.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):  # of infinities
        largest = float(np.max(np.abs(x.astype(wide) - y.astype(wide)))) if x.size else 0.0
    types = f"{a.dtype} and {b.dtype}, " if a.dtype != b.dtype else ""
    return {"equal": False, "why": f"{types}differ by {largest:.6g} at most", "max_difference": largest}
