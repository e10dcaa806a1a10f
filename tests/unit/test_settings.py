"""Settings: their sources, the precedence of these, and invalid values."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

import everstep
from everstep import UsageError
from everstep.agents.launch.command import overrides, parser
from everstep.elastic.api.decorator import elastic
from everstep.elastic.contract.settings import SETTINGS, Arguments, Settings, WorkerContext, declared, resolve
from everstep.elastic.protocol.events import Job

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


# name, type, default, choices: as users' scripts have them. The flag and the variable follow from the name.
FROZEN = """
steps int 0
epochs int 0
last_batch str 'drop' drop|pad|short
skip_bad_samples int 0
global_batch_size int required
micro_batch_size int required
stages int 1
worker_memory int 'auto'
seed int 0
master_dtype str 'float32' float32|none
loss_reduction str 'mean' mean|sum|tokens
protection str 'parity' parity|replay|replicate|none
node_losses int 1
snapshot_every int 'auto'
snapshot_budget float 0.02
on_loss str 'checkpoint' checkpoint|neighbors|stop
verify_every int 100
repeat_every int 0
on_corruption str 'repair' repair|evict
checkpoint str ''
checkpoint_every int 1000
checkpoint_keep int 2
checkpoint_keep_s float 0.0
checkpoint_timeout float 300.0
checkpoint_options str '{}'
resume str 'auto'
resume_hyperparameters str 'checkpoint' checkpoint|script
on_damage str 'stop' stop|older
resume_data str 'check' check|ignore
"""
GIVEN = {  # a value other than the default for each setting, as text and as a value
    "steps": ("3", 3),
    "epochs": ("3", 3),
    "last_batch": ("pad", "pad"),
    "skip_bad_samples": ("3", 3),
    "global_batch_size": ("12", 12),
    "micro_batch_size": ("3", 3),
    "stages": ("auto", -1),
    "worker_memory": ("2GiB", 2 << 30),
    "seed": ("-1", -1),
    "master_dtype": ("none", "none"),
    "loss_reduction": ("tokens", "tokens"),
    "protection": ("replay", "replay"),
    "node_losses": ("2", 2),
    "snapshot_every": ("7", 7),
    "snapshot_budget": ("0.5", 0.5),
    "on_loss": ("stop", "stop"),
    "verify_every": ("0", 0),
    "repeat_every": ("1", 1),
    "on_corruption": ("evict", "evict"),
    "checkpoint": ("/x", "/x"),
    "checkpoint_every": ("9", 9),
    "checkpoint_keep": ("5", 5),
    "checkpoint_keep_s": ("1.5", 1.5),
    "checkpoint_timeout": ("60", 60.0),
    "checkpoint_options": ('{"a": 1}', '{"a": 1}'),
    "resume": ("never", "never"),
    "on_damage": ("older", "older"),
    "resume_hyperparameters": ("script", "script"),
    "resume_data": ("ignore", "ignore"),
}


def test_the_settings_are_these() -> None:
    """These are public: a change breaks the scripts and command lines of users."""
    lines = []
    for known in SETTINGS:
        default = "required" if known.argument is dataclasses.MISSING else repr(known.argument)
        lines.append(" ".join([known.name, known.kind, default, *filter(None, ["|".join(known.about.choices)])]))
        assert known.flag == f"--es-{known.name.replace('_', '-')}"
        assert known.variable == f"EVERSTEP_{known.name.upper()}"
    assert lines == FROZEN.strip().splitlines()


def test_a_setting_is_given_by_variable_flag_file_and_decorator(tmp_path, monkeypatch) -> None:
    """Each setting but `epochs`, which takes the place of `steps`, from each source: the result is the same."""
    assert {known.name for known in SETTINGS} == set(GIVEN)
    given = {name: both for name, both in GIVEN.items() if name != "epochs"}
    settings = [known for known in SETTINGS if known.name in given]
    expected = Settings(**{name: value for name, (_, value) in given.items()})
    assert not [known.name for known in settings if getattr(expected, known.name) == known.default]
    flags = [f"{known.flag}={given[known.name][0]}" for known in settings]
    for name, text in overrides(parser().parse_args([*flags, "script.py"])).items():
        monkeypatch.setenv(name, text)
    assert resolve(DECLARED) == expected
    for known in settings:
        monkeypatch.delenv(known.variable)
    lines = [f"{name} = {value!r}" for name, (_, value) in given.items()]
    write(tmp_path / "all.toml", "\n".join(["[everstep]", *lines]), monkeypatch)
    assert resolve(DECLARED) == expected
    arguments = {name: value for name, (_, value) in given.items()} | {"checkpoint_options": {"a": 1}}
    assert declared(Arguments(**arguments)) == expected


def test_how_long_to_train_is_said_once(monkeypatch) -> None:
    """By steps or by epochs; what the environment says takes the place of either."""
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}
    with pytest.raises(UsageError, match=r"steps \(10\) and epochs \(2\) are both given: leave one of them out"):
        resolve(Settings(steps=10, epochs=2, **sizes))
    with pytest.raises(UsageError, match=r"nothing says how long to train: give steps=N \(optimizer steps\) or"):
        resolve(Settings(**sizes))
    monkeypatch.setenv("EVERSTEP_EPOCHS", "3")
    assert resolve(DECLARED) == Settings(epochs=3, **sizes)
    assert resolve(Settings(**sizes)) == Settings(epochs=3, **sizes)
    monkeypatch.setenv("EVERSTEP_STEPS", "4")
    with pytest.raises(UsageError, match="are both given"):
        resolve(DECLARED)
    monkeypatch.delenv("EVERSTEP_EPOCHS")
    assert resolve(Settings(epochs=2, **sizes)) == Settings(steps=4, **sizes)


def test_no_flag_gives_nothing() -> None:
    assert overrides(parser().parse_args(["script.py"])) == {}


@pytest.mark.parametrize(("flag", "text"), [("steps", "many"), ("snapshot-every", "often"), ("snapshot-budget", "x")])
def test_a_flag_that_cannot_be_read_is_refused_at_once(flag: str, text: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([f"--es-{flag}={text}", "script.py"])
    assert ended.value.code == 2
    assert f"argument --es-{flag}: the value must be a " in capsys.readouterr().err


def test_the_decorators_arguments_are_the_settings() -> None:
    signature = inspect.signature(elastic)
    assert list(signature.parameters) == [known.name for known in SETTINGS]
    for known in SETTINGS:
        default = signature.parameters[known.name].default
        assert default == (inspect.Parameter.empty if known.argument is dataclasses.MISSING else known.argument)
    assert list(get_type_hints(Arguments)) == [known.name for known in SETTINGS]
    needed = {known.name for known in SETTINGS if known.default is dataclasses.MISSING}
    assert {name for name, kind in Arguments.__annotations__.items() if "Required" in str(kind)} == needed
    assert declared(Arguments(steps=10, global_batch_size=8, micro_batch_size=2)) == DECLARED
    automatic = Arguments(steps=10, global_batch_size=8, micro_batch_size=2, snapshot_every="auto")
    assert declared(automatic) == DECLARED


def test_a_misspelled_argument_of_the_decorator_is_pythons_error() -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'stagez'"):
        everstep.elastic(steps=1, global_batch_size=1, micro_batch_size=1, stagez=2)
    with pytest.raises(TypeError, match="missing a required argument: 'global_batch_size'"):
        everstep.elastic(steps=1, micro_batch_size=1)


def test_what_a_worker_says_of_its_settings_has_their_defaults() -> None:
    """The coordinator learns them by `Job`."""
    same = {known.name: known.default for known in SETTINGS}
    found = [field for field in dataclasses.fields(Job) if field.name in same]
    fields = [field for field in found if field.default is not dataclasses.MISSING]
    assert {"protection", "node_losses", "on_loss", "on_damage", "seed"} <= {field.name for field in fields}
    assert {field.name: field.default for field in fields} == {field.name: same[field.name] for field in fields}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """docs/settings.py, a script outside any package."""
    path = Path(__file__).parents[2] / "docs" / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_reference_is_up_to_date(page) -> None:
    text = page.PAGE.read_text()
    assert text == page.page(text), "run python docs/settings.py"
    assert '| `on_loss` | `--es-on-loss` | `"checkpoint"` |' in text


def test_a_page_without_its_marks_is_refused(page) -> None:
    with pytest.raises(ValueError, match="has no lines"):
        page.page("# Reference\n")


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
