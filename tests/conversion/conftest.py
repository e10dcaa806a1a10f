"""Checkpoints that the frameworks themselves wrote, each made once for all the tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.peers import run_peer

SCRIPTS = Path(__file__).parent / "samples"
PLAIN = ["z0-fp32", "z0-bf16", "z1-fp32", "z1-bf16", "z2-bf16", "z3-fp32", "z3-bf16"]
PARALLEL = ["tp2-z1-bf16", "tp2-z3-bf16"]
FOUR = ["moe-z1-bf16", "pp2-dp2-bf16"]  # a pipeline leaves a grid behind, so it comes last
UNIVERSAL = ["z1-bf16", "z2-bf16", "z3-bf16", "tp2-z1-bf16", "tp2-z3-bf16", "pp2-dp2-bf16"]  # DeepSpeed converts these
FRAMEWORKS = {
    *("deepspeed_samples", "deepspeed_kinds", "megatron_samples", "fsdp_samples", "transformers_samples"),
    "apart",
}  # fixtures for which a framework runs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run the frameworks themselves take minutes. `items` are those of all folders."""
    for item in items:
        if SCRIPTS.parent in item.path.parents and needs_frameworks(item):
            item.add_marker(pytest.mark.soak)


def needs_frameworks(item: pytest.Item) -> bool:
    """By a fixture of its own, or by a parameter that names a sample: see `SOURCES` and `SAMPLES` of its module."""
    if FRAMEWORKS & set(getattr(item, "fixturenames", ())):
        return True
    module = getattr(item, "module", None)
    named = {**getattr(module, "SOURCES", {}), **getattr(module, "SAMPLES", {})}
    samples = {name for name, place in named.items() if place[0] in FRAMEWORKS}
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(value, str) and value in samples for value in parameters)


@pytest.fixture(scope="session")
def deepspeed_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each variant: its checkpoint, DeepSpeed's own conversion of it, and the state of the engines."""
    out = tmp_path_factory.mktemp("deepspeed")
    script = SCRIPTS / "deepspeed_samples.py"
    run_peer(script, out, "2", *PLAIN, *PARALLEL)
    run_peer(script, out, "4", *FOUR)
    run_peer(script, out, "0", *UNIVERSAL)
    return out


@pytest.fixture(scope="session")
def deepspeed_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `deepspeed_samples`, of engines that lay out their optimizers in other ways."""
    out = tmp_path_factory.mktemp("deepspeed-kinds")
    script = SCRIPTS / "deepspeed_samples.py"
    run_peer(script, out, "2", "z1-robin-bf16", "z1-bf16-grads", "z2-elastic-bf16", "pp2-z0-fp32")
    return out


@pytest.fixture(scope="session")
def megatron_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, with a checkpoint in both forms and the state of the live processes."""
    root = tmp_path_factory.mktemp("megatron")
    run_peer(SCRIPTS / "megatron_save.py", root)
    return root


@pytest.fixture(scope="session")
def fsdp_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case: the checkpoint that torch wrote, and the state of the live processes."""
    root = tmp_path_factory.mktemp("fsdp")
    run_peer(SCRIPTS / "fsdp_samples.py", "save", root)
    return root


@pytest.fixture(scope="session")
def transformers_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case: the model that transformers saved, and its tensors."""
    root = tmp_path_factory.mktemp("transformers")
    run_peer(SCRIPTS / "transformers_samples.py", "save", root)
    return root
