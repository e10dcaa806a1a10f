"""The two streams of `make test` run every test once, whichever of them does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
