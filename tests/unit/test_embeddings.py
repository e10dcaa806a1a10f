"""Embeddings, with sparse gradients and with dense ones: the numbers are those of plain torch with dense ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import everstep

STEPS, GLOBAL, MICRO = 4, 6, 3  # two micro-batches a step, so their sum has only one order


class Net(nn.Module):
    """Looks words up in `table`; of a small one, some occur several times in a micro-batch."""

    def __init__(self, rows: int, *, sparse: bool) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(rows, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.table(words).sum(1)))
        return found


def words(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randint(0, rows, (STEPS * GLOBAL, 8), generator=generator),
        torch.randn(STEPS * GLOBAL, 1, generator=generator),
    )


def built(rows: int, *, sparse: bool, optimizer: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net(rows, sparse=sparse)
    return net, optimizer(net.parameters(), lr=0.05)


def plain(rows: int, optimizer: Any, *, coalesced: bool = False) -> dict[str, Tensor]:
    """An ordinary training with dense gradients; with `coalesced` they were sparse before, and rounded as those are."""
    net, stepped = built(rows, sparse=coalesced, optimizer=optimizer)
    for inputs, targets in DataLoader(words(rows), batch_size=GLOBAL):
        before: Tensor | None = None
        for part, wanted in zip(inputs.split(MICRO), targets.split(MICRO), strict=True):
            (nn.functional.mse_loss(net(part), wanted) / 2).backward()
            if coalesced:
                gradient = net.table.weight.grad
                assert gradient is not None
                dense = gradient.coalesce().to_dense()
                net.table.weight.grad, before = None, dense if before is None else before + dense
        if coalesced:
            net.table.weight.grad = before
        stepped.step()
        stepped.zero_grad()
    return net.state_dict()


def trained(
    net: Net, optimizer: torch.optim.Optimizer, rows: int, *, loops: bool, **how: Any
) -> dict[str, dict[str, Any]]:
    """The state that a job of one rank ends with."""
    loader, loss_fn = DataLoader(words(rows), batch_size=MICRO), nn.functional.mse_loss
    found: dict[str, Any] = {}

    @everstep.elastic(steps=STEPS, global_batch_size=GLOBAL, micro_batch_size=MICRO)
    def train(run: everstep.Run) -> None:
        if loops:
            model, stepped, batches = run.prepare(net, optimizer, loader, **how)
            for inputs, targets in batches:
                loss_fn(model(inputs), targets).backward()
                stepped.step()
        else:
            for _ in run.steps(net, optimizer, loader, loss_fn=loss_fn, **how):
                pass
        found.update(run.full_state_dict())

    train()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_sparse_gradient_is_made_dense(optimizer: Any, coalesced: bool, loops: bool) -> None:
    net, stepped = built(12, sparse=True, optimizer=optimizer)
    seen: list[bool] = []

    def passed(gradient: Tensor) -> Tensor:
        assert gradient.layout == torch.sparse_coo
        gradient = gradient.coalesce() if coalesced else gradient
        seen.append(gradient.is_coalesced())
        return gradient

    net.table.weight.register_hook(passed)
    found = trained(net, stepped, 12, loops=loops, sparse_gradients="dense")
    assert seen == [coalesced] * (2 * STEPS)
    assert_same(found["model"], plain(12, optimizer, coalesced=coalesced))


def test_several_backwards_of_a_turn() -> None:
    """Torch adds a second sparse gradient to the first, and a sparse one to a dense one."""
    ends = []
    for sparse in (True, False):
        net, stepped = built(12, sparse=sparse, optimizer=torch.optim.SGD)

        @everstep.elastic(steps=STEPS, global_batch_size=GLOBAL, micro_batch_size=MICRO)
        def train(run: everstep.Run, net: Net = net, stepped: Any = stepped, sparse: bool = sparse) -> None:
            loader = DataLoader(words(12), batch_size=MICRO)
            model, optimizer, batches = run.prepare(net, stepped, loader, sparse_gradients="dense")
            for turn, (inputs, _) in enumerate(batches):
                model.table(inputs[:, 0]).sum().backward()
                model.table(inputs[:, 1]).sum().backward()
                if turn % 2:
                    model.table.weight.sum().backward()
                assert (model.table.weight.grad.layout == torch.sparse_coo) == (sparse and turn % 2 == 0)
                optimizer.step()

        train()
        ends.append(net.state_dict())
    assert_same(*ends)


@pytest.mark.parametrize("loops", [True, False])
def test_a_sparse_gradient_is_refused_unless_it_may_be_made_dense(loops: bool) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "parameter 'table.weight' has a sparse gradient: let the runtime make it dense by run.prepare or"),
        ({"sparse_gradients": "coalesced"}, "sparse_gradients must be 'refuse' or 'dense', got 'coalesced'"),
    )
    for how, text in cases:
        net, stepped = built(12, sparse=True, optimizer=torch.optim.SGD)
        with pytest.raises(SystemExit, match=text):
            trained(net, stepped, 12, loops=loops, **how)


def test_sparse_adam_is_refused_by_name() -> None:
    net, stepped = built(12, sparse=True, optimizer=torch.optim.SparseAdam)
    with pytest.raises(SystemExit, match='Use Adam, with sparse=False in the layer or sparse_gradients="dense"'):
        trained(net, stepped, 12, loops=True)


# ---------------------------------------------------------------- large tables


@contextlib.contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Afterwards the list has the most bytes of memory that this process has had meanwhile, more than before."""

    def read(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{field}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what is used now
    before, found = read("VmRSS"), list[int]()
    yield found
    found.append(read("VmHWM") - before)


@pytest.mark.parametrize("loops", [True, False])
def test_a_table_of_a_million_rows(loops: bool) -> None:
    rows = 1_000_000
    trained(*built(10, sparse=False, optimizer=torch.optim.Adam), 10, loops=loops)  # what is imported is not the table
    net, stepped = built(rows, sparse=False, optimizer=torch.optim.Adam)
    with peak_of_memory() as peak:
        found = trained(net, stepped, rows, loops=loops)
    assert_same(found["model"], plain(rows, torch.optim.Adam))
    assert peak[0] < 24 * rows * 16, "parameters, Adam's states, gradients, sums, snapshots: about 14 of its size"
