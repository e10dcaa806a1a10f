"""`everstep convert`, `inspect`, `verify` and `diff`: checkpoints on the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np

from .checkpointing.convert import driver
from .checkpointing.convert.content import Content, ConversionError, Lazy
from .checkpointing.convert.formats import MODULES, Options
from .checkpointing.convert.work import Piece
from .checkpointing.universal.manifest import CheckpointError
from .checkpointing.universal.reader import open_checkpoint
from .checkpointing.universal.store import StoreError

FORMATS = ("universal", *MODULES)
BUDGET_MIB = driver.DEFAULT_BUDGET_BYTES >> 20


class _Failed(Exception):
    """What a user must know."""


def _options(text: list[str]) -> dict[str, str]:
    found = {}
    for item in text:
        name, separator, value = item.partition("=")
        if not separator:
            raise _Failed(f"--set {item}: expected NAME=VALUE")
        found[name] = value
    return found


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; a user's mistake, or a damaged checkpoint, is one line."""
    try:
        return command(arguments)
    except (_Failed, ConversionError, CheckpointError, StoreError) as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


# ---------------------------------------------------------------- convert


def convert(arguments: list[str]) -> int:
    """Bring a checkpoint from one format into another."""
    return _run(_convert, arguments)


def _convert(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep convert", description=convert.__doc__)
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or the URL of a universal checkpoint")
    parser.add_argument("destination", metavar="DST", help="what is made: a folder, or a URL with --to universal")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--from", dest="origin", default="", choices=FORMATS, help="found out if not given")
    parser.add_argument("--rules", action="append", default=[], metavar="FILE", help="how shards make tensors")
    parser.add_argument(
        "--names", default="", metavar="FILE", help="change names by these rules: a file, or llama, qwen2, qwen3, gpt2"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of a format")
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
        force=given.force,
        budget_bytes=max(1, given.memory) << 20,
        **limits,
    )
    content = driver.prepare(conversion)
    if given.explain:
        for line in driver.explain(content):
            print(line)
    if given.dry_run:
        print(f"would write {_summary(content)} to {given.destination}", file=sys.stderr)
        return 0
    with _progress(content) as on_piece:
        driver.convert(conversion, content, on_piece)
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
def _progress(content: Content, stream: TextIO = sys.stderr) -> Iterator[Callable[[Piece], None]]:
    """A bar, where somebody looks."""
    if not stream.isatty():
        yield lambda piece: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    total = sum(2 * tensor.nbytes for _, _, tensor in content.tensors())
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("", total=total)
        yield lambda piece: bar.advance(task, piece.nbytes)


# ---------------------------------------------------------------- inspect


def inspect(arguments: list[str]) -> int:
    """What is in a checkpoint of any format: names, shapes, types, sizes, step."""
    return _run(_inspect, arguments)


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="everstep inspect", description=inspect.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--from", dest="origin", default="", choices=FORMATS)
    parser.add_argument("--rules", action="append", default=[], metavar="FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    origin = driver.format_of(given.checkpoint, given.origin)
    options = Options(rules=tuple(driver.rule_path(rule) for rule in given.rules))
    content = driver.read(given.checkpoint, origin, options)
    found = _described(given.checkpoint, origin, content)
    if given.json:
        print(json.dumps(found))
        return 0
    print(f"{given.checkpoint}: {origin}, {_summary(content)}")
    for key in ("run", "data", "optimizer", "tied"):
        if found.get(key):
            print(f"  {key}: {json.dumps(found[key])}")
    for tensor in found["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        print(f"  {tensor['path']}  {tensor['dtype']} {shape}  {_bytes(tensor['bytes'])}")
    return 0


def _described(where: str, origin: str, content: Content) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    for room, name, tensor in content.tensors():
        entry = {"path": f"{room}/{name}", "dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        tensors.append({**entry, "origin": tensor.origin})
    scalars = {
        state: {name: scalar.value for name, scalar in values.items()} for state, values in content.scalars.items()
    }
    found: dict[str, Any] = {"checkpoint": where, "format": origin, "step": content.step, "tied": content.tied}
    found |= {"scalars": scalars, "dtypes": content.dtypes, "layers": content.layers, "tensors": tensors}
    found["bytes"] = sum(tensor["bytes"] for tensor in tensors)
    if origin == driver.UNIVERSAL:
        checkpoint = open_checkpoint(where)
        manifest = checkpoint.manifest
        sums = {path: list(array.checksums) for path, array in manifest.arrays.items()}
        found |= {"url": checkpoint.url, "run": manifest.run, "data": manifest.data, "optimizer": manifest.optimizer}
        found |= {"saved_at": manifest.saved_at, "checksums": sums}
    return found


# ---------------------------------------------------------------- verify


def verify(arguments: list[str]) -> int:
    """Check every file of a universal checkpoint against its manifest. Exit status 1 if anything is wrong."""
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
        print(json.dumps({**found, "bytes": sum(sizes), "problems": problems}))
    else:
        for problem in problems:
            print(problem)
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
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    sides = [driver.read(where, driver.format_of(where), Options()) for where in (given.a, given.b)]
    rows = list(_differences(*sides, only_params=given.params))
    same = sum(row["equal"] for row in rows)
    if given.json:
        print(json.dumps({"a": given.a, "b": given.b, "equal": same == len(rows), "tensors": rows}))
    else:
        for row in rows:
            if not row["equal"]:
                print(f"{row['path']}: {row['why']}")
        print(f"{same} of {len(rows)} tensors are equal, bit for bit")
    return 0 if same == len(rows) else 1


def _differences(a: Content, b: Content, *, only_params: bool) -> Iterator[dict[str, Any]]:
    ours, theirs = ({(room, name): tensor for room, name, tensor in side.tensors()} for side in (a, b))
    for room, name in sorted(ours.keys() | theirs.keys()):
        if only_params and room != "params":
            continue
        yield {"path": f"{room}/{name}", **_compared(ours.get((room, name)), theirs.get((room, name)))}
    if not only_params and a.step != b.step:
        yield {"path": "step", "equal": False, "why": f"{a.step} and {b.step}"}


def _compared(a: Lazy | None, b: Lazy | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"equal": False, "why": "only in B" if a is None else "only in A"}
    if a.shape != b.shape:
        return {"equal": False, "why": f"shape {list(a.shape)} and {list(b.shape)}"}
    x, y = a.read(), b.read()
    if a.dtype == b.dtype and x.tobytes() == y.tobytes():
        return {"equal": True, "why": "", "max_difference": 0.0}
    wide = np.complex128 if x.dtype.kind == "c" or y.dtype.kind == "c" else np.float64
    largest = float(np.max(np.abs(x.astype(wide) - y.astype(wide)))) if x.size else 0.0
    types = f"{a.dtype} and {b.dtype}, " if a.dtype != b.dtype else ""
    return {"equal": False, "why": f"{types}differ by {largest:.6g} at most", "max_difference": largest}
