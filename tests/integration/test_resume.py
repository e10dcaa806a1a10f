"""Resuming from checkpoints: without the launcher, with states of the user's own, from another framework's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from everstep.checkpointing.universal.reader import committed, open_checkpoint
from everstep.checkpointing.universal.store import open_store
from tests.jobs import JOBS, everstep, run_job
from tests.jobs.interpreter import script

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def lines(output: str) -> list[list[object]]:
    """What the stateful job printed of each step."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("[")]


def stateful(tmp_path, steps, folder="", *flags):
    arguments = json.dumps({"out": str(tmp_path), "steps": steps})
    environment = {"EVERSTEP_CHECKPOINT": str(folder), "EVERSTEP_CHECKPOINT_EVERY": "3"} if folder else {}
    if flags:
        return everstep("run", *flags, str(JOBS / "stateful_job.py"), arguments, environment=environment)
    return script(JOBS / "stateful_job.py", arguments, environment=environment)


@pytest.mark.soak
def test_registered_states_with_tensors_go_along(tmp_path):
    whole = stateful(tmp_path, 10)
    assert whole.status == 0, whole.stderr
    folder = tmp_path / "checkpoints"
    first = stateful(tmp_path, 4, folder)
    second = stateful(tmp_path, 7, folder, "--nproc-per-node=2")
    third = stateful(tmp_path, 10, folder)
    assert lines(first.stdout) + lines(second.stdout) + lines(third.stdout) == lines(whole.stdout)
    assert open_checkpoint(str(folder)).manifest.registered["noise"]["last"]["dtype"] == "bfloat16"


@pytest.mark.soak
def test_alone_a_damaged_checkpoint_is_named_or_passed_over(tmp_path):
    folder = tmp_path / "checkpoints"
    for steps in (3, 6):
        assert stateful(tmp_path, steps, folder).status == 0
    newest = folder / committed(open_store(str(folder)))[0]
    (newest / "params" / "weight" / "c" / "0" / "0").write_bytes(b"short")
    ended = stateful(tmp_path, 8, folder)
    assert "params/weight/c/0/0 is damaged: 5 bytes, expected 60" in ended.error()
    arguments = json.dumps({"out": str(tmp_path), "steps": 8})
    environment = {"EVERSTEP_CHECKPOINT": str(folder), "EVERSTEP_ON_DAMAGE": "older"}
    ended = script(JOBS / "stateful_job.py", arguments, environment=environment)
    assert ended.status == 0, ended.stderr
    assert "the checkpoint before it is used" in ended.stderr
    assert lines(ended.stdout) == lines(stateful(tmp_path, 8).stdout)[3:]


SCRIPT = """
import sys, torch, everstep
from torch import nn

@everstep.elastic(steps=int(sys.argv[2]), global_batch_size=8, micro_batch_size=2, resume=sys.argv[1])
def train(run):
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.randn(40, 2))
    losses = [s.index for s in run.steps(model, optimizer, data, loss_fn=nn.functional.mse_loss, scheduler=scheduler)]
    print("first", losses[:1], "rate", optimizer.param_groups[0]["lr"])
    torch.save(run.full_state_dict(), sys.argv[3])

train()
"""


@pytest.mark.soak
@pytest.mark.parametrize(("workers", "folder"), [(1, "dcp"), (3, "u")])
def test_a_job_starts_from_a_checkpoint_of_torch(tmp_path, workers, folder):
    """The job begins with what plain torch trained and saved, as it is or converted: values, moments, step, rate."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        model(torch.randn(4, 6)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert everstep("convert", str(tmp_path / "dcp"), str(tmp_path / "u"), "--to", "universal").status == 0
    script, out = tmp_path / "script.py", tmp_path / "state.pt"
    script.write_text(SCRIPT)
    flags = ["run", f"--nproc-per-node={workers}"]
    ended = everstep(*flags, str(script), str(tmp_path / folder), "5", str(out))
    assert ended.status == 0, ended.stderr
    found = torch.load(out, weights_only=True)
    for name, tensor in weights.items():
        assert torch.equal(found["model"][name], tensor)
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(found["optimizer"][name][kind], state["state"][name][kind]), (name, kind)
    ended = everstep(*flags, str(script), str(tmp_path / folder), "7", str(out))
    assert "first [5] rate 0.00125" in ended.stdout, "the script's scheduler is at step 7"


def test_a_job_that_does_not_fit_a_converted_checkpoint_says_why(tmp_path):
    model = nn.Linear(3, 3)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert everstep("convert", str(tmp_path / "dcp"), str(tmp_path / "u"), "--to", "universal").status == 0
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = everstep("run", "--nproc-per-node=1", str(script), str(tmp_path / "u"), "5", str(tmp_path / "state.pt"))
    assert "does not continue this job: it has no params/0.weight" in ended.error()
    shutil.rmtree(tmp_path / "u")
    ended = everstep("run", "--nproc-per-node=1", str(script), str(tmp_path / "u"), "5", str(tmp_path / "state.pt"))
    assert "not an everstep checkpoint: there is no manifest.json" in ended.error()


def test_an_unwritable_state_is_refused_by_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.replace(
            "    data =",
            "    class Odd:\n        def state_dict(self): return {'x': [object()]}\n"
            "        def load_state_dict(self, state): pass\n"
            "    run.register_state('odd', Odd())\n    data =",
        )
    )
    ended = everstep("run", "--nproc-per-node=1", str(script), "never", "5", str(tmp_path / "state.pt"))
    assert "register_state('odd')['x'][0] is a object: what ranks share may hold" in ended.error()


def test_results_of_a_job_alone_and_of_one_under_the_launcher_meet_in_one_folder(tmp_path):
    """The same names for the same folder: a relative path is the user's, whichever process writes."""
    assert (
        run_job(nproc=2, steps=2, flags=[f"--es-checkpoint={tmp_path}/x/../x", "--es-checkpoint-every=1"]).status == 0
    )
    assert open_checkpoint(str(tmp_path / "x")).manifest.step == 2
