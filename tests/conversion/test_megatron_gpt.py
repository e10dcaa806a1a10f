"""A GPT of megatron-core in an elastic job: Megatron's own losses in any layout, kills, and going on from its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import assert_same_state
from tests.jobs.leftovers import nothing_left
from tests.jobs.peers import ROOT, elastic_peer, run_peer

__all__ = ["nothing_left"]
pytestmark = pytest.mark.soak
SCRIPTS = Path(__file__).parent / "samples"
EXAMPLE = ROOT / "docs" / "examples" / "megatron_gpt.py"
SMALL = ["--layers=2", "--width=32"]
CASES = {"tied": [], "untied": ["--untied", "--rope"]}
STEPS, SAVED = 20, 10
ROUNDING = 1e-6  # of losses of 5.5, whose neighbours in float32 are 5e-7 away
LAYOUTS = {"1 rank": ["--nproc-per-node=1"], "2 stages x 2 ranks": ["--nproc-per-node=4", "--es-stages=2"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron-core's own runs, of one process each."""
    out = tmp_path_factory.mktemp("alone")
    run_peer(SCRIPTS / "megatron_gpt_alone.py", out)
    return out


def job(layout: str, *arguments: str, save: Path, flags: list[str] | None = None, **options: Any) -> dict[int, float]:
    """Run the example; returns the loss of each step."""
    flags = [*LAYOUTS[layout], f"--es-steps={STEPS}", *(flags or [])]
    output = elastic_peer(EXAMPLE, *SMALL, *arguments, f"--save={save}", flags=flags, **options)
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", output)}


@pytest.mark.parametrize(
    ("case", "layout"), [("tied", "1 rank"), ("tied", "2 stages x 2 ranks"), ("untied", "2 stages x 2 ranks")]
)
def test_the_losses_are_those_of_megatron(alone: Path, tmp_path: Path, case: str, layout: str) -> None:
    losses = job(layout, "--dropout=0", *CASES[case], save=tmp_path / "state.pt")
    expected = json.loads((alone / case / "losses.json").read_text())
    assert losses == pytest.approx(dict(enumerate(expected)), abs=ROUNDING)
    found = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    parameters = torch.load(alone / case / "state.pt", weights_only=True)
    assert set(parameters) <= set(found), "they have Megatron's names"
    for name, tensor in parameters.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


KILLS = [  # rank 0 prints and saves
    {"rank": 1, "phase": "compute", "step": 2},
    {"rank": 3, "phase": "update", "step": 4},
    {"rank": 2, "phase": "commit", "step": 6},
    {"rank": 1, "phase": "reduce", "step": 13, "incarnation": 1},  # this life may begin later
    {"rank": 3, "phase": "agree", "step": 16, "incarnation": 1},
]


def test_kills_change_no_byte(alone: Path, tmp_path: Path) -> None:
    """With dropout, which is a layer's for a step and a micro-batch, whichever rank computes it."""
    expected = job("1 rank", "--dropout=0.1", save=tmp_path / "expected.pt")
    without = json.loads((alone / "tied" / "losses.json").read_text())
    assert expected != pytest.approx(dict(enumerate(without)), abs=ROUNDING), "dropout is there"
    events = tmp_path / "events.jsonl"
    flags = [f"--es-events={events}"]
    losses = job("2 stages x 2 ranks", "--dropout=0.1", save=tmp_path / "killed.pt", flags=flags, faults=KILLS)
    assert events.read_text().count('"event": "worker_died"') >= 3
    assert losses == expected
    found, state = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("killed", "expected"))
    assert_same_state(found, state)


def test_a_job_goes_on_from_a_checkpoint_of_megatron(alone: Path, tmp_path: Path) -> None:
    """As Megatron itself continues: from the folder that its dist_checkpointing wrote, on two stages, with kills."""
    flags = [f"--es-resume={alone / 'tied' / 'megatron'}"]
    faults = [{"rank": 1, "phase": "compute", "step": SAVED}, {"rank": 2, "phase": "update", "step": SAVED}]
    losses = job("2 stages x 2 ranks", "--dropout=0", save=tmp_path / "state.pt", flags=flags, faults=faults)
    expected = dict(enumerate(json.loads((alone / "tied" / "losses.json").read_text())))
    assert losses == pytest.approx({step: loss for step, loss in expected.items() if step >= SAVED}, abs=ROUNDING)


def test_other_forms_train_alike() -> None:
    """Activations that are computed again, with dropout, change no bit; nor does a loop of the script's own, much."""
    losses = json.loads(run_peer(SCRIPTS / "megatron_forms.py").splitlines()[-1])
    assert losses["recompute"] == losses["recompute all"] == losses["as it is"]
    assert losses["loop"] == pytest.approx(losses["without dropout"], abs=ROUNDING)
    assert losses["loop"] != pytest.approx(losses["as it is"], abs=ROUNDING)


def test_what_does_not_go_is_refused_by_name() -> None:
    settings = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_moe_experts": 4, "fp8": "e4m3"}
    settings |= {"gradient_accumulation_fusion": True, "recompute_granularity": "selective"}
    settings |= {"position_embedding_type": "yarn", "post_process": False, "multi_latent_attention": True}
    said = json.loads(run_peer(SCRIPTS / "megatron_refusals.py", json.dumps(settings)).splitlines()[-1])
    assert said.pop("as it is") == ""
    assert said.pop("plain") == "staged() takes a GPTModel of megatron.core.models.gpt, got Linear"
    assert said.pop("groups").startswith("there is a process group of 2 ranks already")
    assert said.pop("tensor_model_parallel_size") == (
        "tensor_model_parallel_size=2 of a Megatron model: tensor parallelism is not supported yet; use 1"
    )
    assert said.keys() < settings.keys()
    assert not [name for name, text in said.items() if name not in text]
