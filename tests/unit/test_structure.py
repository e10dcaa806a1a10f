"""What may import what, what is public, and that generated code is what its sources generate."""

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
ROOMS = {  # in the order of docs/design.md: each with the rooms it may import
    "resharding": set(),
    "elastic.protocol": {"resharding"},
    "elastic.sim": {"resharding", "elastic.protocol"},
    "comms": {"resharding", "elastic.protocol"},
    "checkpointing": {"resharding", "comms"},
    "elastic": {"resharding", "elastic.protocol", "elastic.sim", "comms", "checkpointing"},
    "agents": {"resharding", "elastic.protocol", "elastic.sim", "comms", "checkpointing", "elastic"},
}


def room_of(module: str) -> str:
    """The room of a module named without `everstep.`; the longest that fits."""
    fitting = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(fitting, key=len, default="everstep")


def sources(room: str) -> Iterator[Path]:
    folder = ROOT / room.replace(".", "/")
    for path in sorted(folder.rglob("*.py")):
        if room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) == room:
            yield path


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, in full; ours without `everstep.`."""
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


@pytest.mark.parametrize("room", ["resharding", "elastic.protocol", "elastic.sim"])
def test_pure_rooms_use_no_torch_clock_or_network(room: str) -> None:
    for path in sources(room):
        found = {module.split(".")[0] for module in imported(path)}
        impure = {"torch", "numpy", "time", "socket", "threading", "grpc", "asyncio", "subprocess", "os"}
        assert not found & impure, f"{path.relative_to(ROOT)} imports {found & impure}"


@pytest.mark.parametrize(
    "module",
    ["checkpointing.keeper", "resharding.plan", "elastic.protocol.coordinator", "elastic.sim.run", "cli"],
)
def test_modules_that_never_import_torch(module: str) -> None:
    check = f"import sys, everstep.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_public_names() -> None:
    assert everstep.__all__ == ["Run", "Step", "UsageError", "elastic", "state_digest"]
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
    subprocess.run(["sh", str(ROOT / "comms" / "generate.sh"), str(tmp_path)], check=True, env=environment, timeout=60)
    generated = sorted(tmp_path.iterdir())
    names = ["everstep_pb2.py", "everstep_pb2.pyi", "everstep_pb2_grpc.py", "telemetry_pb2.py", "telemetry_pb2.pyi"]
    names += ["rendezvous_pb2.py", "rendezvous_pb2.pyi", "rendezvous_pb2_grpc.py"]
    assert [path.name for path in generated] == sorted(names)
    for path in generated:
        assert path.read_text() == (ROOT / "comms" / path.name).read_text(), f"run comms/generate.sh: {path.name}"
