"""The rules from Hugging Face to Megatron: renamed models give the same logits in both libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everstep.checkpointing.convert.core.content import Content
from everstep.checkpointing.convert.files.torchfile import load
from everstep.checkpointing.convert.files.torchwriting import save
from everstep.checkpointing.convert.rules.renaming import rename
from everstep.checkpointing.convert.rules.rulefile import built_in, read_rules
from tests.jobs.peers import run_peer

SCRIPT = Path(__file__).parent / "samples" / "names_samples.py"
GROUPS = {"llama": 2, "qwen2": 2, "qwen3": 2, "gpt2": 4}


@pytest.fixture(scope="session")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """For each model: how far the logits are apart, and how large they are."""
    out = tmp_path_factory.mktemp("names")
    run_peer(SCRIPT, "save", out)
    for name, groups in GROUPS.items():
        state = load(out / f"{name}.pt")["state"]
        content = Content(step=0, params={key: tensor.lazy() for key, tensor in state.items()})
        variables = {"heads": 4, "groups": groups, "head_dim": 4}
        rules = read_rules(built_in(name)).names
        megatron = rename(rules, "a to b", content, variables)
        save(out / f"{name}-megatron.pt", megatron.params)
        back = rename(rules, "b to a", megatron, variables)
        assert back.params.keys() == content.params.keys()
        for key, tensor in content.params.items():
            assert back.params[key].read().tobytes() == tensor.read().tobytes()
    found: dict[str, list[float]] = json.loads(run_peer(SCRIPT, "compare", out).splitlines()[-1])
    return found


@pytest.mark.parametrize("name", GROUPS)
def test_both_libraries_compute_the_same(name: str, apart: dict[str, list[float]]) -> None:
    difference, size = apart[name]
    assert size > 0.5
    assert difference < 1e-4 * size
