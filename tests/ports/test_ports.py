"""Training scripts in the manner of public ones: few lines differ in their Everstep form, and kills change no byte."""

from __future__ import annotations

import difflib
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import HANG_S, finish, same
from tests.jobs.hosts import Hosts
from tests.jobs.interpreter import launchers, script

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "guide" / "examples.md"
SCRIPTS = sorted(path.parent.name for path in HERE.glob("*/plain.py"))
FORMS = ("plain", "ported")
MOST = 5  # lines that differ
RANKS = 3
PHASES = ("compute", "reduce", "agree", "update", "commit")


def forms(name: str) -> tuple[list[str], list[str]]:
    """The lines of the plain and of the ported script, without empty ones."""
    plain, ported = ((HERE / name / f"{form}.py").read_text().splitlines() for form in FORMS)
    return [line for line in plain if line.strip()], [line for line in ported if line.strip()]


def changed_lines(plain: list[str], ported: list[str]) -> int:
    """Lines that are replaced, added or removed: in each place the larger of what goes and what comes."""
    matcher = difflib.SequenceMatcher(None, plain, ported, autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


def test_few_lines_differ() -> None:
    """In each script; and the page that shows it is up to date."""
    counts = {name: changed_lines(*forms(name)) for name in SCRIPTS}
    assert counts
    assert all(0 < count <= MOST for count in counts.values()), counts
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", PAGE.read_text(), re.M)
    assert {name: int(count) for name, count in rows} == counts
    shown = re.findall(r"^```diff\n--- (\w+).*?\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert sorted(name for name, _ in shown) == SCRIPTS
    for name, text in shown:
        difference = list(difflib.unified_diff(*forms(name), n=0, lineterm=""))[2:]
        assert text.splitlines()[1:] == [line for line in difference if not line.startswith("@@")], name


def alone(name: str, form: str, out: Path) -> None:
    out.mkdir()
    ended = script(HERE / name / f"{form}.py", str(out))
    assert ended.status == 0, ended.stderr


def results(out: Path) -> dict[str, Any]:
    """What a script has written, by the names of the files."""
    found = {}
    for path in out.iterdir():
        found[path.name] = torch.load(path, weights_only=True) if path.suffix == ".pt" else path.read_bytes()
    return found


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """The places where two results differ, tensors by `torch.equal`."""
    if type(found) is not type(expected):
        return [where]
    if isinstance(expected, dict):
        names = found.keys() | expected.keys()
        return [bad for name in names for bad in differences(found.get(name), expected.get(name), f"{where}/{name}")]
    if isinstance(expected, list | tuple) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [bad for i, (a, b) in pairs for bad in differences(a, b, f"{where}/{i}")]
    return [] if same(found, expected) else [where]


# In each place one more life of a rank ends: of one, two or all three ranks before the first replacement is there.
DYING = [(i // 7 + i) % RANKS for i in range(20)]
KILLS = [
    {"rank": rank, "phase": PHASES[i % len(PHASES)], "step": 2 + i, "incarnation": DYING[:i].count(rank)}
    for i, rank in enumerate(DYING)
]


@pytest.mark.soak
@pytest.mark.parametrize("name", SCRIPTS)
def test_kills_change_no_byte(name: str, tmp_path: Path) -> None:
    for form in FORMS:
        alone(name, form, tmp_path / form)
    expected = results(tmp_path / "ported")
    assert expected
    assert expected.keys() == results(tmp_path / "plain").keys()

    out, events = tmp_path / "killed", tmp_path / "events.jsonl"
    out.mkdir()
    flags = ["--nproc-per-node", str(RANKS), "--es-events", str(events)]
    faults = {"EVERSTEP_FAULTS": json.dumps(KILLS)}
    ended = launchers.run([*flags, str(HERE / name / "ported.py"), str(out)], faults, HANG_S, mixed=True)
    assert ended.status == 0, ended.stdout[-4000:]
    assert not differences(results(out), expected)
    deaths = [
        event for line in events.read_text().splitlines() if (event := json.loads(line))["event"] == "worker_died"
    ]
    assert len(deaths) >= len(KILLS) - RANKS, deaths  # the last life of a rank may begin when training is over


@pytest.mark.soak
@pytest.mark.parametrize("name", ["image_classifier", "diffusion", "dcgan"])
def test_a_node_is_lost(name: str, tmp_path: Path) -> None:
    """Four nodes of one worker each; the node of rank 1 dies, and three continue."""
    alone(name, "ported", tmp_path / "alone")
    out, events, program = tmp_path / "killed", tmp_path / "events.jsonl", HERE / name / "ported.py"
    out.mkdir()
    faults = json.dumps([{"rank": 1, "phase": "update", "step": 9, "kind": "node"}])
    with Hosts(4) as hosts:
        hosts.coordinator("3:4", f"--es-events={events}")
        flags = ["--nnodes=3:4", "--nproc-per-node=1", "--es-snapshot-every=1", f"--log-dir={tmp_path}/logs"]
        nodes = [hosts.launch(host, program, [str(out)], flags, {"EVERSTEP_FAULTS": faults}) for host in hosts.hosts]
        outputs = {node.pid: finish(node) for node in nodes}
    assert sorted(node.returncode for node in nodes) == [-signal.SIGKILL, 0, 0, 0], outputs
    assert events.read_text().count('"event": "node_lost"') == 1
    assert not differences(results(out), results(tmp_path / "alone"))
