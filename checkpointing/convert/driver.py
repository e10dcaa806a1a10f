"""A conversion from beginning to end: what is asked for, what it would do, and doing it, so that nothing is lost.

The destination appears whole or not at all: a folder is written beside it, under another name, and renamed last; at a
URL the manifest is written last. What a killed conversion has done is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..universal.manifest import NAME as MANIFEST
from ..universal.manifest import CheckpointError
from ..universal.reader import load as load_universal
from ..universal.reader import open_checkpoint
from ..universal.store import LocalStore, StoreError, open_store
from . import universal
from .content import Content, ConversionError
from .formats import Options, detect, load
from .renaming import Direction, rename
from .rulefile import RuleFile, built_in, read_rules
from .work import Piece, Work

DEFAULT_BUDGET_BYTES = 256 << 20
UNIVERSAL = "universal"
_PARTIAL = ".everstep-partial"
_REPLACED = ".everstep-replaced"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be converted into what, and how. `origin` and `rules` empty: found out, and none."""

    source: str
    destination: str
    to: str
    origin: str = ""
    rules: tuple[str, ...] = ()  # files, or names of those that come with everstep
    names: str = ""  # the rule file by which names are changed
    settings: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    budget_bytes: int = DEFAULT_BUDGET_BYTES

    @property
    def options(self) -> Options:
        return Options(rules=tuple(rule_path(rule) for rule in self.rules), settings=dict(self.settings))


def rule_path(rule: str) -> Path:
    """A rule file: a path, or the name of one that comes with everstep."""
    return Path(rule) if "/" in rule or rule.endswith(".toml") else built_in(rule)


def format_of(source: str, origin: str = "") -> str:
    """The format of what is at `source`: as given, or as found. Raises ConversionError if it is none."""
    if origin:
        return origin
    try:
        open_checkpoint(source)
    except CheckpointError as error:
        if "://" in source or error.damaged or (Path(source) / MANIFEST).exists():
            raise ConversionError(str(error)) from None
    except StoreError as error:
        if "://" in source:
            raise ConversionError(str(error)) from None
    else:
        return UNIVERSAL
    return detect(Path(source))


def read(source: str, origin: str, options: Options) -> Content:
    """The contents of the checkpoint at `source`. Raises ConversionError."""
    try:
        if origin == UNIVERSAL:
            return universal.contents(open_checkpoint(source))
        if "://" in source:
            raise ConversionError(f"{source}: {origin} checkpoints are read from local folders: copy it first")
        return load(origin).read(Path(source), options)
    except (CheckpointError, StoreError) as error:
        raise ConversionError(str(error)) from None
    except PermissionError as error:
        raise ConversionError(f"{error.filename}: permission denied") from None


def prepare(conversion: Conversion) -> Content:
    """What would be written: read, and renamed if that is asked for."""
    origin = format_of(conversion.source, conversion.origin)
    content = read(conversion.source, origin, conversion.options)
    if conversion.names:
        content = renamed(content, read_rules(rule_path(conversion.names)), conversion.settings)
    return content


def renamed(content: Content, rules: RuleFile, settings: Mapping[str, str]) -> Content:
    """`content` under the other names of a rule file, in the direction in which its names fit."""
    variables = _variables(content, rules, settings)
    names = list(content.params)
    sides: dict[Direction, int] = {
        "a to b": sum(any(p.match(name) for rule in rules.names for p in rule.a) for name in names),
        "b to a": sum(any(p.match(name) for rule in rules.names for p in rule.b) for name in names),
    }
    direction = max(sides, key=lambda side: sides[side])
    return rename(rules.names, direction, content, variables)


def _variables(content: Content, rules: RuleFile, settings: Mapping[str, str]) -> dict[str, int]:
    """The numbers of the model that the rules need: as set, or from the configuration that came with it."""
    known = _model_numbers(content)
    found: dict[str, int] = {}
    for name in rules.variables:
        text = settings.get(name, known.get(name))
        if text is None:
            raise ConversionError(
                f"{rules.path.name} needs the model's {', '.join(rules.variables)}, and the checkpoint does not say "
                f"{name}: give it with --set {name}=N"
            )
        try:
            found[name] = int(text)
        except ValueError:
            raise ConversionError(f"--set {name}={text}: expected a whole number") from None
    return found


def _model_numbers(content: Content) -> dict[str, Any]:
    config: dict[str, Any] = content.extra.get("hf", {}).get("config", {})
    arguments: dict[str, Any] = content.extra.get("megatron", {}).get("args", {})
    heads = config.get("num_attention_heads") or config.get("n_head") or arguments.get("num_attention_heads")
    if not heads:
        return {}
    groups = config.get("num_key_value_heads") or arguments.get("num_query_groups") or heads
    width = config.get("hidden_size") or config.get("n_embd") or arguments.get("hidden_size")
    size = config.get("head_dim") or arguments.get("kv_channels") or (width and int(width) // int(heads))
    return {"heads": heads, "groups": groups, **({"head_dim": size} if size else {})}


def explain(content: Content) -> Iterator[str]:
    """A line for every tensor: what it will be, where it is from, and by which rule."""
    for room, name, tensor in content.tensors():
        note = content.notes.get(name, "")
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        yield f"{room}/{name}  {tensor.dtype} {shape}  from {tensor.origin}" + (f"  [{note}]" if note else "")
    for alias, owner in content.tied.items():
        yield f"tied  {alias} -> {owner}"


def convert(conversion: Conversion, content: Content, on_piece: Callable[[Piece], None] = lambda piece: None) -> None:
    """Write `content` where it is to be. Raises ConversionError; the destination is then as it was."""
    try:
        if "://" in conversion.destination:
            _convert_to_url(conversion, content, on_piece)
        else:
            _convert_to_folder(conversion, content, on_piece)
    except (StoreError, CheckpointError) as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        where = error.filename or conversion.destination
        raise ConversionError(f"cannot write {where}: {error.strerror or error}") from None


def _identity(conversion: Conversion) -> dict[str, Any]:
    """What makes an earlier attempt one at the same conversion: source as it is now, target, rules."""
    path = Path(conversion.source)
    files = []
    if "://" not in conversion.source:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in found if file.is_file()]
    rules = [rule_path(rule).read_text() for rule in (*conversion.rules, *filter(None, [conversion.names]))]
    text = json.dumps([files, rules, sorted(conversion.settings.items())])
    return {"source": conversion.source, "to": conversion.to, "state": hashlib.sha256(text.encode()).hexdigest()}


def _work(conversion: Conversion, folder: Path, on_piece: Callable[[Piece], None]) -> Work:
    return Work(folder, threads=conversion.threads, budget_bytes=conversion.budget_bytes, on_done=on_piece)


def _convert_to_url(conversion: Conversion, content: Content, on_piece: Callable[[Piece], None]) -> None:
    if conversion.to != UNIVERSAL:
        raise ConversionError(f"{conversion.destination}: only universal checkpoints are written to a URL")
    store = open_store(conversion.destination)
    if load_universal(store) is not None:
        if not conversion.force:
            raise ConversionError(f"{conversion.destination} has a checkpoint already: --force replaces it")
        store.remove(MANIFEST)
        store.remove("")
    universal.write(
        content, store, Work.unrecorded(conversion.threads, conversion.budget_bytes, on_piece), _identity(conversion)
    )


def _convert_to_folder(conversion: Conversion, content: Content, on_piece: Callable[[Piece], None]) -> None:
    target = Path(conversion.destination).absolute()
    if target.exists() and not conversion.force and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists already: --force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + _PARTIAL)
    identity = _identity(conversion)
    marker = partial.with_name(partial.name + ".json")
    if not partial.exists() or not marker.exists() or marker.read_text() != json.dumps(identity):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        marker.write_text(json.dumps(identity))
    if conversion.to == UNIVERSAL:
        unrecorded = Work.unrecorded(conversion.threads, conversion.budget_bytes, on_piece)
        universal.write(content, LocalStore(partial), unrecorded, identity)
    else:
        work = _work(conversion, partial, on_piece)
        load(conversion.to).write(content, partial, conversion.options, work)
        work.close()
    _put_in_place(partial, target)
    marker.unlink(missing_ok=True)


def _put_in_place(partial: Path, target: Path) -> None:
    replaced = target.with_name(target.name + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(partial, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)
