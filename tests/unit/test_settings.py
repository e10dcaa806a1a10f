"""Settings: where they come from, which wins, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from everstep import UsageError
from everstep.elastic.contract.settings import Settings, WorkerContext, resolve

DECLARED = Settings(steps=10, global_batch_size=8, micro_batch_size=2)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("EVERSTEP_")]:
        monkeypatch.delenv(name)


def write(path: Path, text: str, monkeypatch) -> None:
    path.write_text(text)
    monkeypatch.setenv("EVERSTEP_CONFIG", str(path))


def test_defaults_and_what_follows() -> None:
    assert resolve(DECLARED) == DECLARED
    assert (DECLARED.stages, DECLARED.seed, DECLARED.micro_batches) == (1, 0, 4)


def test_environment_over_file_over_decorator(tmp_path, monkeypatch) -> None:
    write(tmp_path / "e.toml", "[everstep]\nsteps = 20\nseed = 5\n[other]\nsteps = 1\n", monkeypatch)
    monkeypatch.setenv("EVERSTEP_STEPS", "30")
    assert resolve(DECLARED) == Settings(steps=30, global_batch_size=8, micro_batch_size=2, seed=5)


def test_every_setting_has_a_variable(monkeypatch) -> None:
    values = {"steps": 3, "global_batch_size": 12, "micro_batch_size": 3, "stages": 2, "seed": -1}
    for name, value in values.items():
        monkeypatch.setenv(f"EVERSTEP_{name.upper()}", str(value))
    assert resolve(DECLARED) == Settings(**values)


def test_a_file_without_our_table_says_nothing(tmp_path, monkeypatch) -> None:
    write(tmp_path / "e.toml", "[tool]\nx = 1\n", monkeypatch)
    assert resolve(DECLARED) == DECLARED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[everstep]\nstep = 3\n", r"unknown setting 'step' in \[everstep\]; there are .*steps"),
        ("[everstep\n", "is not TOML"),
        ("[everstep]\nsteps = 'many'\n", "steps must be a whole number of at least 1, got 'many'"),
        ("[everstep]\nsteps = true\n", "steps must be a whole number of at least 1, got True"),
        ("[everstep]\nmicro_batch_size = 3\n", r"\(8\) must be a multiple of micro_batch_size \(3\)"),
    ],
)
def test_mistakes_in_a_file(tmp_path, monkeypatch, text: str, message: str) -> None:
    write(tmp_path / "e.toml", text, monkeypatch)
    with pytest.raises(UsageError, match=message):
        resolve(DECLARED)


def test_a_file_that_is_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EVERSTEP_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match=r"EVERSTEP_CONFIG names .*none.toml, which cannot be read: No such file"):
        resolve(DECLARED)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("STEPS", "1e3", "EVERSTEP_STEPS must be a whole number, got '1e3'"),
        ("STAGES", "0", "stages must be a whole number of at least 1, got 0"),
        ("GLOBAL_BATCH_SIZE", "7", "must be a multiple"),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, name: str, text: str, message: str) -> None:
    monkeypatch.setenv(f"EVERSTEP_{name}", text)
    with pytest.raises(UsageError, match=message):
        resolve(DECLARED)


def test_a_workers_context_comes_through_the_environment(monkeypatch) -> None:
    assert WorkerContext.from_environment() is None
    context = WorkerContext(
        rank=3,
        incarnation=1,
        world_size=8,
        host="10.0.0.1",
        host_id="h",
        token="t",
        control_fd=4,
        progress_fd=5,
        keeper_name="k",
        shared_memory=False,
    )
    for name, value in context.to_environment().items():
        monkeypatch.setenv(name, value)
    assert WorkerContext.from_environment() == context
