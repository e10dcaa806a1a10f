"""Which room may import which, what is public, and that generated code matches its sources."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import everstep

ROOT = Path(__file__).parents[2]
_CONVERT = "checkpointing.convert"
_CORE = {f"{_CONVERT}.core", "checkpointing.universal"}
_FORMATS = {*_CORE, f"{_CONVERT}.files", f"{_CONVERT}.rules", f"{_CONVERT}.formats.dcp"}
_WORKER = {"resharding", "elastic.protocol", "comms.base", "comms.mesh", "elastic.contract"}
_MEMORY = {"checkpointing.access", "checkpointing.memory", "checkpointing.universal"}
_AGENT = {"elastic.protocol", "elastic.contract", "comms.base", "comms.control", "agents.base"}
ROOMS = {  # from the bottom up: each with the rooms it may import
    "resharding": set(),
    "elastic.protocol": {"resharding"},
    "elastic.sim": {"resharding", "elastic.protocol"},
    "comms.base": set(),
    "comms.mesh": {"comms.base"},
    "comms.control": {"comms.base"},
    "checkpointing.universal": set(),
    "checkpointing.memory": {"checkpointing.universal", "resharding"},
    "checkpointing.access": {"resharding", "comms.base", "checkpointing.memory"},
    "checkpointing.saving": {*_MEMORY, "resharding", "comms.base"},
    "checkpointing.keeper": {*_MEMORY, "resharding", "comms.base", "checkpointing.saving"},
    _CONVERT: set(),
    f"{_CONVERT}.core": {"checkpointing.universal"},
    f"{_CONVERT}.files": _CORE,
    f"{_CONVERT}.rules": _CORE,
    f"{_CONVERT}.formats": _CORE,
    f"{_CONVERT}.formats.dcp": {*_CORE, f"{_CONVERT}.files"},
    f"{_CONVERT}.formats.deepspeed": _FORMATS,
    f"{_CONVERT}.formats.megatron": _FORMATS,
    f"{_CONVERT}.formats.huggingface": _FORMATS,
    f"{_CONVERT}.drive": {*_CORE, f"{_CONVERT}.rules", f"{_CONVERT}.formats"},
    "elastic.contract": _WORKER - {"elastic.contract"},
    "elastic.holding": {*_WORKER, "checkpointing.memory"},
    "elastic.step": {*_WORKER, "elastic.holding"},
    "elastic.guard": {*_WORKER, *_MEMORY, "checkpointing.saving", "elastic.holding", "elastic.step"},
    "elastic.engine": {*_WORKER, *_MEMORY, f"{_CONVERT}.drive", "elastic.holding", "elastic.step", "elastic.guard"},
    "elastic.api": {*_WORKER, *_MEMORY, "elastic.holding", "elastic.step", "elastic.engine"},
    "elastic": {"elastic.api"},
    "agents.base": {"elastic.protocol"},
    "agents.analysis": {"elastic.protocol", "elastic.contract", "comms.control", "resharding"},
    "agents.monitoring": {*_AGENT, "agents.analysis"},
    "agents.rendezvous": _AGENT,
    "agents.node": {*_AGENT, "agents.analysis", "agents.monitoring", "checkpointing.access"},
    "agents.coordinator": {*_AGENT, "resharding", "agents.monitoring", "agents.rendezvous"},
    "agents.launch": {*_AGENT, "agents.monitoring", "agents.node", "agents.coordinator"},
    "agents.tools": {*_AGENT, "agents.analysis", "agents.monitoring"},
}


def room_of(module: str) -> str:
    """The room of a module named without `everstep.`; the longest that matches."""
    fitting = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(fitting, key=len, default="everstep")


def sources(room: str) -> Iterator[Path]:
    folder = ROOT / room.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if room_of(".".join(parts[:-1] if parts[-1] == "__init__" else parts)) == room:
            yield path


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name; ours without `everstep.`."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("everstep.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *((node.module or "").split(".") if node.module else [])]
            for alias in node.names:
                name = ".".join([*stem, alias.name])
                yield name.removeprefix("everstep.")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = list(sources(room))
    assert files
    for path in files:
        for module in imported(path):
            if module.split(".")[0] in {name.split(".")[0] for name in ROOMS} | {"everstep"}:
                other = room_of(module)
                assert other == room or other in ROOMS[room], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("room", ["resharding", "elastic.protocol", "elastic.sim", "agents.analysis"])
def test_pure_rooms_use_no_torch_clock_or_network(room: str) -> None:
    for path in sources(room):
        found = {module.split(".")[0] for module in imported(path)}
        impure = {"torch", "numpy", "time", "socket", "threading", "grpc", "asyncio", "subprocess", "os"}
        assert not found & impure, f"{path.relative_to(ROOT)} imports {found & impure}"


@pytest.mark.parametrize(
    "module",
    [
        *("checkpointing.keeper.service", "resharding.plan", "elastic.protocol.coordinator", "elastic.sim.run", "cli"),
        "agents.launch.coordinate",
    ],
)
def test_modules_that_never_import_torch(module: str) -> None:
    check = f"import sys, everstep.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_a_keeper_imports_numpy_when_it_computes_parity() -> None:
    """Not at its start, for which its node waits."""
    check = "import sys, everstep.checkpointing.keeper.service; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


_STANDS_IN = "the simulator's, in place of it"
SAME_NAMES = {  # public classes that share a name: why; every other name is unique
    "Aborted": _STANDS_IN,
    "Backups": _STANDS_IN,
    "Block": f"of parity: {_STANDS_IN}",
    "Exchange": _STANDS_IN,
    "Fault": _STANDS_IN,
    "JobEnded": _STANDS_IN,
    "Keeper": _STANDS_IN,
    "Node": f"a machine: {_STANDS_IN}",
    "Pipeline": _STANDS_IN,
    "Prefetcher": _STANDS_IN,
    "Protection": _STANDS_IN,
    "Replicas": _STANDS_IN,
    "Saving": _STANDS_IN,
    "Snapshots": _STANDS_IN,
    "StateStore": _STANDS_IN,
    "StepState": _STANDS_IN,
    "Storage": f"of checkpoints: {_STANDS_IN}",
}


def public_classes() -> dict[str, list[str]]:
    """The classes of the product without a leading underscore: name -> the files that define one."""
    found: dict[str, list[str]] = {}
    for room in ["everstep", *ROOMS]:
        for path in sources(room) if room != "everstep" else sorted((ROOT / room).glob("**/*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                        found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    return found


def test_no_two_public_classes_share_a_name() -> None:
    """In a stack trace, a search or an import, a name should suffice. The simulator's classes may share one."""
    classes = public_classes()
    assert len(classes) > 500
    twice = {name: paths for name, paths in classes.items() if len(paths) > 1}
    assert not [f"{name}: {', '.join(paths)}" for name, paths in twice.items() if name not in SAME_NAMES]
    others = {name: [path for path in paths if not path.startswith("elastic/sim/")] for name, paths in twice.items()}
    assert not {name: paths for name, paths in others.items() if len(paths) > 1}, "one of them is the simulator's"
    assert set(twice) >= set(SAME_NAMES), f"these do not stand twice any more: {set(SAME_NAMES) - set(twice)}"


def test_public_names() -> None:
    assert everstep.__all__ == ["Run", "Step", "UsageError", "elastic", "join", "state_digest"]
    for name in everstep.__all__:
        assert callable(getattr(everstep, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        everstep.nothing  # noqa: B018
    assert everstep.elastic.__name__ == "everstep.elastic", "the package and the decorator share a name"


def test_the_package_is_typed() -> None:
    assert (ROOT / "everstep" / "py.typed").exists()


def test_generated_code_is_what_the_proto_generates(tmp_path) -> None:
    pytest.importorskip("grpc_tools")
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(
        ["sh", str(ROOT / "comms" / "control" / "generate.sh"), str(tmp_path)], check=True, env=environment, timeout=60
    )
    generated = sorted(tmp_path.iterdir())
    names = ["everstep_pb2.py", "everstep_pb2.pyi", "everstep_pb2_grpc.py", "telemetry_pb2.py", "telemetry_pb2.pyi"]
    names += ["rendezvous_pb2.py", "rendezvous_pb2.pyi", "rendezvous_pb2_grpc.py"]
    assert [path.name for path in generated] == sorted(names)
    for path in generated:
        assert path.read_text() == (ROOT / "comms" / "control" / path.name).read_text(), (
            f"run comms/control/generate.sh: {path.name}"
        )
