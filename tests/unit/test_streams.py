"""The two streams of `make test` run every test once, whichever of them does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import Claims

ROOT = Path(__file__).parents[2]
TEST = """
import time
from pathlib import Path
import pytest
@pytest.mark.parametrize("number", range(5))
def test_it(number):
    with Path({log!r}).open("a") as log:
        log.write(f"{{Path(__file__).name}} {{number}}\\n")
    time.sleep(0.01)
"""


def stream(folder: Path, *flags: str) -> subprocess.Popen[str]:
    options = ["-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command = [sys.executable, "-m", "pytest", *options, f"--claims={folder / 'claims'}", *flags, str(folder / "tests")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With six files of five tests each, which append to `log` when they run."""
    for name in ("tests", "claims"):
        (tmp_path / name).mkdir()
    for name in "abcdef":
        (tmp_path / "tests" / f"test_{name}.py").write_text(TEST.format(log=str(tmp_path / "log")))
    return tmp_path


def test_every_test_runs_once(folder: Path) -> None:
    for process in [stream(folder), stream(folder, "--from-the-back")]:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    ran = (folder / "log").read_text().splitlines()
    assert sorted(ran) == [f"test_{name}.py {number}" for name in "abcdef" for number in range(5)]


def test_no_folder_of_tests_is_left_out() -> None:
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TESTS := ")]
    folders = line.removeprefix("TESTS := $(addprefix tests/,").removesuffix(")").split()
    assert sorted(folders) == sorted({path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")})


def test_the_second_begins_at_the_back(folder: Path) -> None:
    process = stream(folder, "--from-the-back")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    files = [line.split()[0] for line in (folder / "log").read_text().splitlines()]
    assert list(dict.fromkeys(files)) == [f"test_{name}.py" for name in "fedcba"]


def test_what_takes_long_is_the_last_of_the_first_stream(folder: Path) -> None:
    long = [ROOT / name for name in Claims.LONG]
    assert all(path.exists() for path in long)
    items = [SimpleNamespace(nodeid=f"{name}::test") for name in (*Claims.LONG, "tests/a.py", "tests/b.py")]
    claims = folder / "claims"
    first = [item.nodeid for item in Claims(claims, items, backwards=False)]
    assert first == [f"{name}::test" for name in ("tests/a.py", "tests/b.py", *Claims.LONG)]
    assert not list(Claims(claims, items, backwards=True)), "they are taken"


def test_the_streams_share_the_file_where_they_meet(folder: Path) -> None:
    items = [SimpleNamespace(nodeid=f"tests/a.py::{number}") for number in range(4)]
    first, second = (iter(Claims(folder / "claims", items, backwards=backwards)) for backwards in (False, True))
    taken = [next(stream).nodeid[-1] for stream in (first, second, first, second)]
    assert taken == ["0", "1", "2", "3"]
    assert not [*first, *second]


def test_processor_seconds_are_those_of_children_too(folder: Path) -> None:
    busy = "import time\nwhile time.process_time() < 1: pass"
    test = f"import subprocess, sys\ndef test_it(): subprocess.run([sys.executable, '-c', {busy!r}], check=True)"
    (folder / "tests" / "test_busy.py").write_text(test)
    output, _ = stream(folder, "--cpu-times").communicate(timeout=100)
    (line,) = [line for line in output.splitlines() if line.endswith("test_busy.py")]
    assert float(line.split()[0]) > 0.5, output  # the two clocks differ by ticks
