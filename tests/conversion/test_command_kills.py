"""Conversions that are killed: the destination is absent or whole at every moment, and no work is repeated."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .commands import Commands, chunks, files, safetensors

KILLS = Path(__file__).parent / "kills.py"
TENSORS, ROWS, COLUMNS = 48, 512, 256  # 24 MiB
SLOWLY = ("--threads", "1", "--memory", "1")
TARGETS = ("universal", "deepspeed-universal", "hf")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return safetensors(folder / "model" / "model.safetensors", {f"w{n}": (ROWS, COLUMNS) for n in range(TENSORS)})


def killed(target: Path, after: list[float], *arguments: str | Path) -> list[dict]:
    """The attempts at a conversion: each killed after some pieces (see kills.py), except the last one."""
    done = subprocess.run(
        [sys.executable, KILLS, target, json.dumps(after), *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [attempt["status"] for attempt in attempts[:-1]] == [-9] * (len(attempts) - 1), done
    assert attempts[-1]["status"] == 0, done
    return attempts


def assert_nothing_twice(attempts: list[dict]) -> None:
    """The pieces finished before a kill are unchanged after the next one."""
    for before, after in itertools.pairwise(attempts):
        if after["pieces"]:  # else it has ended
            assert {name: after["pieces"].get(name) for name in before["pieces"]} == before["pieces"]
    assert all(piece["told"] == 1 for attempt in attempts for piece in attempt["pieces"].values())


def unchanging(out: Path, to: str) -> dict[str, bytes]:
    return chunks(out) if to == "universal" else files(out)


@pytest.mark.parametrize("to", [TARGETS[0], *(pytest.param(to, marks=pytest.mark.soak) for to in TARGETS[1:])])
def test_killed_at_any_moment(to: str, model: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", model, tmp_path / "calm", "--to", to, *SLOWLY)
    rng = random.Random(to)
    kills, progress = 0, 0
    for trial, most in enumerate((3, 8)):
        out = tmp_path / f"out{trial}"
        attempts = killed(out, [rng.uniform(0, most) for _ in range(20)], "convert", model, out, "--to", to, *SLOWLY)
        kills += len(attempts) - 1
        progress += sum(0 < len(attempt["pieces"]) < TENSORS for attempt in attempts)
        assert not any(attempt["there"] for attempt in attempts[:-2])
        assert_nothing_twice(attempts)
        assert unchanging(out, to) == unchanging(tmp_path / "calm", to)
        run.done("diff", model, out)
    assert kills >= 10
    assert progress >= 5, "few kills were in the middle of the writing"
    assert sorted(os.listdir(tmp_path)) == ["calm", "out0", "out1"]


def test_what_is_replaced_stays_until_the_new_is_whole(model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    old = safetensors(tmp_path / "old" / "model.safetensors", {"w0": (3,)})
    run.done("convert", old, out, "--to", "universal")
    begun = files(out)
    rng = random.Random(5)
    after, to = [rng.uniform(0, 10) for _ in range(20)], "universal"
    process = subprocess.Popen(
        [sys.executable, KILLS, out, json.dumps(after), "convert", model, out, "--to", to, "--force", *SLOWLY],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    absent = looked = 0
    while process.poll() is None:  # at every moment there is a checkpoint
        absent += not (out / "manifest.json").exists()
        looked += 1
    attempts = [json.loads(line) for line in process.stdout]
    process.stdout.close()
    assert (absent, process.returncode) == (0, 0)
    assert looked > 100
    assert len(attempts) > 1
    assert all(attempt["there"] for attempt in attempts)
    run.done("diff", model, out)
    assert files(out) != begun
    assert sorted(os.listdir(tmp_path)) == ["old", "out"]


def test_killed_once_the_old_is_still_there(model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    old = safetensors(tmp_path / "old" / "model.safetensors", {"w0": (3,)})
    run.done("convert", old, out, "--to", "hf")
    before = files(out)
    partly(model, out, "--to", "universal", "--force")
    assert files(out) == before
    assert f"{out} exists already" in run("convert", model, out, "--to", "universal", *SLOWLY).error()
    run.done("convert", model, out, "--to", "universal", "--force", *SLOWLY)
    run.done("diff", model, out)


def begun(out: Path) -> Path:
    return out.with_name(out.name + ".everstep-partial")


def partly(model: Path, out: Path, *arguments: str) -> dict[str, bytes]:
    """Kill a real process once it has written something; returns what it leaves."""
    command = [sys.executable, "-m", "everstep", "convert", str(model), str(out), *arguments, *SLOWLY]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(begun(out).rglob("*"))) < 30 and process.poll() is None:
        assert time.monotonic() < deadline
    process.kill()
    assert process.wait() == -9
    return files(begun(out))


@pytest.mark.parametrize("change", ["source", "rules", "setting", "target"])
def test_after_a_change_all_is_begun_anew(change: str, model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    rules = tmp_path / "rules.toml"
    rules.write_text('[[name]]\na = "w{n}"\nb = "v{n}"\n')
    names = ["--names", str(rules)]
    source = tmp_path / "source"
    source.mkdir()
    os.link(model / "model.safetensors", source / "model.safetensors")
    partly(source, out, "--to", "universal", *names)
    stale = begun(out) / "params" / "stale"
    stale.mkdir()
    to, more = "universal", names
    if change == "source":
        (source / "model.safetensors").unlink()
        safetensors(source / "model.safetensors", {f"w{n}": (ROWS, COLUMNS) for n in range(TENSORS)}, seed=2)
    elif change == "rules":
        rules.write_text('[[name]]\na = "w{n}"\nb = "u{n}"\n')
    elif change == "setting":
        to, more = "hf", [*names, "--set", "dtype=bfloat16"]
    else:
        to = "hf"
    run.done("convert", source, tmp_path / "calm", "--to", to, *more)
    run.done("convert", source, out, "--to", to, *more)
    assert unchanging(out, to) == unchanging(tmp_path / "calm", to)
    assert not (out / "params" / "stale").exists()
    assert sorted(os.listdir(tmp_path)) == ["calm", "out", "rules.toml", "source"]


def test_two_at_the_same_destination(model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "everstep", "convert", str(model), str(out), "--to", "universal", *SLOWLY]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not begun(out).exists():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGSTOP)  # so that it stays where it is
    try:
        assert f"{out}: another process is converting to it" in run("convert", model, out, "--to", "hf").error()
    finally:
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[1].startswith("wrote step 0")
    run.done("diff", model, out)


def interrupted(command: list[str], out: Path) -> subprocess.Popen[str]:
    """A conversion that has got a SIGINT while it wrote; it may have ended before, and is started again then."""
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not begun(out).exists() and process.poll() is None:
            pass
        process.send_signal(signal.SIGSTOP)
        if begun(out).exists():
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            return process
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[1].startswith("wrote step 0")
        shutil.rmtree(out)


def test_somebody_at_the_keyboard(model: Path, tmp_path: Path, run: Commands) -> None:
    out = tmp_path / "out"
    process = interrupted(
        [sys.executable, "-m", "everstep", "convert", str(model), str(out), "--to", "universal", *SLOWLY], out
    )
    told = process.communicate(timeout=60)[1]
    assert told == "everstep: error: interrupted; run the same conversion again to continue it\n"
    assert process.returncode == 130
    assert not out.exists()
    run.done("convert", model, out, "--to", "universal")
    run.done("diff", model, out)
