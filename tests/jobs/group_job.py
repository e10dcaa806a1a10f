"""A script in the manner of DistributedDataParallel's: it logs and decides by torch.distributed, between steps."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])


def refusal(call, *arguments, **named):
    """What a call is refused with, if it is."""
    try:
        call(*arguments, **named)
    except everstep.UsageError as error:
        return str(error)
    return ""


def some_are_refused():
    """A group of some ranks; torch makes others of it, too."""
    assert "an elastic job of" in refusal(dist.new_group, [0])
    assert "an elastic job of" in refusal(dist.new_subgroups, 1)


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=1, seed=5)
def train(run):
    run.init_process_group()
    group = dist.new_group(backend="gloo")  # as scripts do for barriers beside NCCL
    assert group is dist.new_group(range(run.world_size))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.randn(40, 2))
    for step in run.steps(model, optimizer, data, loss_fn=nn.functional.mse_loss):
        assert (dist.get_rank(), dist.get_world_size()) == (run.rank, run.world_size)
        # In float64 the mean of up to three equal float32 values is exact, however many ranks there are.
        loss, largest = torch.tensor(step.loss).double(), torch.tensor([step.index, -step.index])
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, async_op=True).wait()
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert 1 <= int(ones) <= 3
        said = [{"step": step.index, "rate": optimizer.param_groups[0]["lr"]}]
        dist.broadcast_object_list(said, src=0)
        dist.barrier(group)
        assert dist.get_rank(group) == run.rank
        places = [torch.zeros(1) for _ in range(dist.get_world_size(group))] if run.rank == 0 else None
        own = torch.full((1,), float(step.index))
        refused = refusal(dist.gather, own, places, dst=0, group=group)
        if refused:
            assert "has room for the tensors of" in refused, refused  # a rank was lost in this call
        else:
            assert run.rank or all(int(place) == step.index for place in places)
        if run.world_size > 1:
            some_are_refused()
        run.state["log"] = [*run.state.get("log", []), [float(loss), largest.tolist(), said[0]]]
    state = {**run.full_state_dict(), "shared": dict(run.state)}
    torch.save(state, out / f"state-{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    train()
    assert not dist.is_initialized()
