"""Worker processes of a DataLoader that are not forked: what they get, and what they give."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import Settings
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.evaluation_data import EvaluationData
from everstep.elastic.step.streams import StreamPlace

SETTINGS = Settings(epochs=3, global_batch_size=8, micro_batch_size=2)
KEYS = [(step, number) for step in range(3) for number in range(4)]


class Told:
    def note(self, what: str, fields: Any) -> None:
        raise AssertionError(fields)


class Noisy(Dataset[Tensor]):
    """Draws random numbers."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(3)


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(40)


def loader(data: Any = None, **how: Any) -> DataLoader[Any]:
    return DataLoader(Noisy() if data is None else data, batch_size=2, **how)


def source(data: DataLoader[Any], settings: Settings = SETTINGS) -> DataSource:
    return DataSource(data, settings, None, Told(), StreamPlace(Progress(None, 0, 1, [])))


def fetched(data: DataSource) -> list[Any]:
    return [data.fetch(*key, partial(iter, KEYS[at:])) for at, key in enumerate(KEYS)]


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0, 3.0] * 20, 40, generator=torch.Generator())


@pytest.mark.parametrize("sampler", [None, weighted()])
def test_a_pickled_copy_gives_the_same(sampler: Any) -> None:
    data = source(loader(sampler=sampler, shuffle=None if sampler else True))
    requests = [data.request(key) for key in KEYS]
    expected = [data.load(request) for request in requests]
    copied = pickle.loads(pickle.dumps(data))
    assert same([copied.load(request) for request in requests], expected)
    assert same(fetched(data), expected)
    evaluation = EvaluationData(loader(), 2, 5)
    batches = dict(evaluation.batches(range(3)))
    copied = pickle.loads(pickle.dumps(evaluation))
    assert same([copied._load((0, number)) for number in range(3)], [batches[number] for number in range(3)])


def test_spawned_processes_fetch_what_this_one_does() -> None:
    expected = fetched(source(loader(sampler=weighted())))
    data = source(loader(sampler=weighted(), num_workers=1, multiprocessing_context="spawn"))
    try:
        assert same(fetched(data), expected)
    finally:
        data.close()


class Local:
    """Gives what cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("it holds an open file")


@pytest.mark.parametrize(
    ("data", "settings", "text"),
    [
        (
            [Local()] * 16,
            SETTINGS,
            r"are started by 'spawn', and its dataset, .* have to be pickled for them: it holds an open file",
        ),
        (
            Numbers(),
            Settings(steps=3, global_batch_size=8, micro_batch_size=2),
            "are started by 'spawn', and those that read a stream have to be forked",
        ),
    ],
)
def test_what_cannot_be_given_to_them_is_refused(data: Any, settings: Settings, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        source(loader(data, num_workers=1, multiprocessing_context="spawn"), settings).digests()


SCRIPT = """
import torch, everstep

run = everstep.join(steps=2, global_batch_size=4, micro_batch_size=2)
model = torch.nn.Linear(1, 1)
data = torch.utils.data.TensorDataset(torch.ones(8, 1), torch.ones(8, 1))
loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
steps = run.steps(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, loss_fn=torch.nn.functional.mse_loss)
print(len(list(steps)))
"""


@pytest.mark.soak
@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_that_spawned_processes_import(guarded: bool, tmp_path: Path) -> None:
    """Its training is under a guard, or the process says that it has to be."""
    lines = SCRIPT.strip().splitlines()
    if guarded:
        lines = [lines[0], 'if __name__ == "__main__":', *("    " + line for line in lines[2:])]
    (tmp_path / "train.py").write_text("\n".join(lines))
    ended = subprocess.run([sys.executable, tmp_path / "train.py"], capture_output=True, text=True, timeout=300)
    assert (ended.returncode == 0, ended.stdout.strip() == "2") == (guarded, guarded), ended.stderr
    assert ('put the training under if __name__ == "__main__":' in ended.stderr) == (not guarded), ended.stderr
