"""A conversion from start to end: its request, its plan, and its execution.

The destination appears complete or not at all: a folder is written beside it, under another name, and renamed last; at
a URL the manifest is written last. A repeated conversion skips the finished pieces of a killed one.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import Content, ConversionError
from everstep.checkpointing.convert.core.format import (
    READ_ONLY,
    READ_SETTINGS,
    WRITE_SETTINGS,
    WRITTEN_BY_TORCH,
    Options,
    detect,
    load,
)
from everstep.checkpointing.convert.core.work import (
    NOBODY,
    PieceWork,
    Planned,
    PlannedWork,
    WorkWatch,
)
from everstep.checkpointing.convert.formats import universal
from everstep.checkpointing.convert.rules.patterns import Pattern
from everstep.checkpointing.convert.rules.renaming import Direction, rename
from everstep.checkpointing.convert.rules.rulefile import (
    BUILT_IN,
    RuleFile,
    built_in,
    read_rules,
)
from everstep.checkpointing.universal.manifest import NAME as MANIFEST
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.reader import load as load_universal
from everstep.checkpointing.universal.reader import open_checkpoint
from everstep.checkpointing.universal.store import LocalStore, StoreError, open_store
from everstep.checkpointing.universal.writer import PARTS

from . import placing
from .leaving import check_understood, fit, leave_out
from .verifying import verify, verify_universal
from .wrappers import unwrap

DEFAULT_BUDGET_BYTES = 256 << 20
UNIVERSAL = "universal"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be converted into what, and how. `origin` and `rules` empty: found out, and none."""

    source: str
    destination: str
    to: str
    origin: str = ""
    rules: tuple[str, ...] = ()  # files, or names of rule files in the package
    names: str = ""  # the rule file by which names are changed
    settings: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()  # patterns of names that may be left out
    verify: bool = True  # read again what was written, before it is put in place
    force: bool = False
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    budget_bytes: int = DEFAULT_BUDGET_BYTES

    def __post_init__(self) -> None:
        for name in ("source", "destination"):  # a URL of the local file system is a path
            object.__setattr__(self, name, getattr(self, name).removeprefix("file://"))

    @property
    def options(self) -> Options:
        return Options(rules=tuple(rule_path(rule) for rule in self.rules), settings=dict(self.settings))


def rule_path(rule: str) -> Path:
    """A rule file: a path, or the name of a rule file in the package."""
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
        if "://" in source or isinstance(error.__cause__, PermissionError):
            raise ConversionError(str(error)) from None
    else:
        return UNIVERSAL
    try:
        return detect(Path(source))
    except OSError as error:
        raise _unreadable(source, error) from None


def _unreadable(source: str, error: OSError) -> ConversionError:
    return ConversionError(f"cannot read {error.filename or source}: {error.strerror or error}")


def read(source: str, origin: str, options: Options) -> Content:
    """The contents of the checkpoint at `source`. Raises ConversionError."""
    content = _read(source, origin, options)
    unwrap(content, source)
    return content


def _read(source: str, origin: str, options: Options) -> Content:
    try:
        if origin == UNIVERSAL:
            return universal.contents(open_checkpoint(source))
        if "://" in source:
            raise ConversionError(f"{source}: {origin} checkpoints are read from local folders: copy it first")
        return load(origin).read(Path(source), options)
    except (CheckpointError, StoreError) as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise _unreadable(source, error) from None
    except ConversionError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        # Values of strangers: what is absent or of another kind than its library writes, wherever a reader looks.
        raise ConversionError(f"{source}: not laid out as {origin} checkpoints are: {error!r}") from error


def prepare(conversion: Conversion) -> Content:
    """The content to write: read, and renamed if requested. Raises ConversionError."""
    rules = [read_rules(path) for path in conversion.options.rules]
    names = read_rules(rule_path(conversion.names)) if conversion.names else None
    origin = format_of(conversion.source, conversion.origin)
    known = (*READ_SETTINGS.get(origin, ()), *WRITE_SETTINGS.get(conversion.to, ()))
    check_settings(conversion.settings, (*known, *(names.variables if names else ())))
    content = read(conversion.source, origin, conversion.options)
    if names:
        before = _all_names(content)
        content = renamed(content, names, conversion.settings)
        content.warnings += _unused(names, before)
    for file in rules:
        content.warnings += _unused(file, _all_names(content) + (before if names else []))
    leave_out(content, conversion.drop)
    check_understood(content, conversion.source)
    fit(content, conversion.to)
    _plan(conversion, content)
    return content


def check_settings(settings: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConversionError for a setting that means nothing here."""
    known = list(known)
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConversionError(
                f"--set {name}: there is no such setting here{meant}; there are {', '.join(known) or 'none'}"
            )


def _all_names(content: Content) -> list[str]:
    return [*content.params, *content.buffers, *content.frozen, *content.tied]


def _unused(file: RuleFile, names: list[str]) -> list[str]:
    """Warnings about the user's rules that match nothing; the package's rules are for many models, and may."""
    if file.path.parent == BUILT_IN:
        return []
    rules: list[tuple[str, tuple[Pattern, ...]]] = [(rule.where, rule.patterns) for rule in file.shards]
    rules += [(rule.where, (*rule.a, *rule.b)) for rule in file.names]
    return [
        f"{where}: matches no name"
        for where, patterns in rules
        if not any(pattern.match(name) for pattern in patterns for name in names)
    ]


def _plan(conversion: Conversion, content: Content) -> None:
    """Raise ConversionError for what would be found out on writing, before anything is written."""
    if conversion.to in READ_ONLY:
        raise ConversionError(f"{conversion.to} checkpoints are read, and not written")
    if conversion.to in WRITTEN_BY_TORCH and not _has_torch():
        raise ConversionError(f"{conversion.to} checkpoints are written by torch, and torch is not installed")
    if "://" in conversion.destination:
        if conversion.to != UNIVERSAL:
            raise ConversionError(f"{conversion.destination}: only universal checkpoints are written to a URL")
    elif "://" not in conversion.source:
        placing.check_apart(Path(conversion.source), _target(conversion))
    if conversion.to == UNIVERSAL:
        try:
            universal.manifest_of(content).to_bytes()
        except TypeError as error:
            raise ConversionError(f"{conversion.source}: what it holds besides tensors is not JSON: {error}") from error
        return
    with contextlib.suppress(Planned):
        load(conversion.to).write(content, _target(conversion), conversion.options, PlannedWork())


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except ImportError:
        return False


def _target(conversion: Conversion) -> Path:
    return Path(os.path.abspath(conversion.destination))


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


def check_free(conversion: Conversion) -> None:
    """Raise ConversionError if there is something at the destination that may not be replaced."""
    if "://" not in conversion.destination:
        placing.check_free(_target(conversion), force=conversion.force)
        return
    store = open_store(conversion.destination)
    if load_universal(store) is not None:
        if not conversion.force:
            raise ConversionError(f"{conversion.destination} has a checkpoint already: --force replaces it")
    elif not universal.is_attempt(store) and (store.folders() or store.sizes()):
        raise ConversionError(
            f"{conversion.destination}: has files that are of no checkpoint: give a folder that is empty, or new"
        )


def convert(conversion: Conversion, content: Content, watch: WorkWatch = NOBODY) -> None:
    """Write `content` where it is to be. Raises ConversionError; the destination is then as it was."""
    try:
        if "://" in conversion.destination:
            _convert_to_url(conversion, content, watch)
        else:
            _convert_to_folder(conversion, content, watch)
    except (StoreError, CheckpointError) as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        where = error.filename or conversion.destination
        raise ConversionError(f"cannot write {where}: {error.strerror or error}") from None


def _identity(conversion: Conversion) -> dict[str, Any]:
    """What makes an earlier attempt one at the same conversion: source as it is now, target, rules, settings."""
    path = Path(conversion.source)
    files = []
    if "://" not in conversion.source:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in found if file.is_file()]
    rules = [rule_path(rule).read_text() for rule in (*conversion.rules, *filter(None, [conversion.names]))]
    text = json.dumps([files, rules, sorted(conversion.settings.items()), conversion.origin, conversion.drop])
    return {"source": conversion.source, "to": conversion.to, "state": hashlib.sha256(text.encode()).hexdigest()}


def _convert_to_url(conversion: Conversion, content: Content, watch: WorkWatch) -> None:
    check_free(conversion)
    store = open_store(conversion.destination)
    if load_universal(store) is not None:
        store.remove(MANIFEST)
        store.remove("")
    work = PieceWork.unrecorded(conversion.threads, conversion.budget_bytes, watch)
    universal.write(content, store, work, _identity(conversion))
    if conversion.verify:
        try:
            verify_universal(open_checkpoint(conversion.destination), work)
        except ConversionError:
            store.remove(MANIFEST)  # first: what is removed in part must not be there for a reader
            store.remove("")
            raise


def _convert_to_folder(conversion: Conversion, content: Content, watch: WorkWatch) -> None:
    target = _target(conversion)
    identity = _identity(conversion)
    with placing.attempt(target, identity) as attempt:
        if not attempt.is_in_place:
            placing.check_free(target, force=conversion.force)
            if not attempt.is_whole:
                attempt.begin()
                try:
                    _write(conversion, content, attempt.partial, identity, watch)
                except ValueError:  # the source is bad; after an error of the disk the conversion can be continued
                    attempt.clear()
                    raise
                attempt.finish()
            attempt.put_in_place()
        attempt.clear()


def _write(
    conversion: Conversion, content: Content, partial: Path, identity: Mapping[str, Any], watch: WorkWatch
) -> None:
    unrecorded = PieceWork.unrecorded(conversion.threads, conversion.budget_bytes, watch)
    if conversion.to == UNIVERSAL:
        store = LocalStore(partial)
        if load_universal(store) is None:  # else an earlier attempt was killed when all was done
            universal.write(content, store, unrecorded, identity)
        store.remove(PARTS)
        if conversion.verify:
            verify_universal(open_checkpoint(str(partial)), unrecorded)
    else:
        work = PieceWork(partial, threads=conversion.threads, budget_bytes=conversion.budget_bytes, watch=watch)
        load(conversion.to).write(content, partial, conversion.options, work)
        work.close()
        if conversion.verify:
            found = read(str(partial), conversion.to, Options(rules=conversion.options.rules))
            verify(content, found, conversion.to, unrecorded)
    if _identity(conversion) != identity:
        raise ConversionError(f"{conversion.source} has changed while it was converted: convert it again")
