"""Training scripts in the manner of public ones: few lines differ in their Everstep form, and kills change no byte."""

from __future__ import annotations

import difflib
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import finish, same
from tests.jobs.hosts import Hosts
from tests.jobs.interpreter import script
from tests.jobs.peers import PYTHON, ROOT, run_peer

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "guide" / "examples.md"
SCRIPTS = sorted(path.parent.name for path in HERE.glob("*/plain.py"))
FORMS = ("plain", "ported")
FRAMEWORKS = {"hf_peft"}  # what needs the environment of `make peers`
MOST = 5  # lines that differ
RANKS = 4
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
    if name in FRAMEWORKS:
        run_peer(HERE / name / f"{form}.py", out)
        return
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


# Ten kills, the node of rank 1 is lost, and ten more of those that remain. Each kill ends one more life of its rank: of
# one, two or all ranks before the first replacement is there.
LOST = 1
DYING = [*((i // 7 + i) % RANKS for i in range(10)), *((0, 2, 3)[i % 3] for i in range(10))]
KILLS = [
    {"rank": rank, "phase": PHASES[i % len(PHASES)], "step": 2 + i, "incarnation": DYING[:i].count(rank)}
    for i, rank in enumerate(DYING)
]
NODE = {"rank": LOST, "phase": "update", "step": 12, "incarnation": DYING.count(LOST), "kind": "node"}


@pytest.mark.soak
@pytest.mark.parametrize("name", SCRIPTS)
def test_kills_and_the_loss_of_a_node_change_no_byte(name: str, tmp_path: Path) -> None:
    """Four nodes of one worker each."""
    for form in FORMS:
        alone(name, form, tmp_path / form)
    expected = results(tmp_path / "ported")
    assert expected
    assert expected.keys() == results(tmp_path / "plain").keys()

    out, log, program = tmp_path / "killed", tmp_path / "events.jsonl", HERE / name / "ported.py"
    out.mkdir()
    environment = {"EVERSTEP_FAULTS": json.dumps([*KILLS, NODE]), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    python = PYTHON if name in FRAMEWORKS else sys.executable
    with Hosts(RANKS) as hosts:
        hosts.coordinator(f"{RANKS - 1}:{RANKS}", f"--es-events={log}")
        flags = [f"--nnodes={RANKS - 1}:{RANKS}", "--nproc-per-node=1", "--es-snapshot-every=1"]
        flags.append(f"--log-dir={tmp_path}/logs")
        nodes = [hosts.launch(host, program, [str(out)], flags, environment, python) for host in hosts.hosts]
        outputs = {node.pid: finish(node) for node in nodes}
    assert sorted(node.returncode for node in nodes) == [-signal.SIGKILL, 0, 0, 0], outputs
    assert not differences(results(out), expected)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("node_lost") == 1
    assert events.count("worker_died") >= len(KILLS) - RANKS, events  # a last life may begin when training is over
