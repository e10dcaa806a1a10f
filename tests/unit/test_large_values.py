"""Large values by their content: named, handed to a keeper, and got back from the keepers that have them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.contents import PIECE_BYTES, digest_of
from everstep.elastic.api.sharing import SharedState
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import decode, digests_in, encode
from everstep.elastic.engine import large_values
from everstep.elastic.engine.large_values import LargeValues
from everstep.elastic.guard.agreeing import _state_differs

TOKEN = "token"


def nothing() -> None:
    pass


@pytest.fixture
def ending() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def keeper(name: str, unix: str, ending: contextlib.ExitStack) -> KeeperServer:
    server = KeeperServer(Keeper(name), unix, "127.0.0.1", 0, TOKEN)
    threading.Thread(target=server.serve, daemon=True).start()
    ending.callback(server.close)
    return server


def values_at(unix: str, ending: contextlib.ExitStack) -> LargeValues:
    link = KeeperLink(unix, TOKEN, 0, 0)
    ending.callback(link.close)
    return LargeValues(link)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def state_of(values: LargeValues, **state: Any) -> Any:
    return encode(state, "run.state", values.keep)


def fetched(keepers: dict[str, str], state: Any) -> Any:
    """Another process: what it gets."""
    other = LargeValues(None)
    other.fetch(state, keepers, TOKEN, nothing)
    return decode(state, other.give)


def test_values_of_every_kind_come_back(ending: contextlib.ExitStack) -> None:
    server, values = keeper("a", "es-large-kinds", ending), values_at("es-large-kinds", ending)
    before: dict[str, Any] = {
        "several": some(3, PIECE_BYTES // 8),
        "half": some(5000, 3, dtype=torch.bfloat16),
        "turned": some(300, 200).t(),
        "counts": torch.arange(9000),
        "array": np.arange(9000).reshape(3, 3000)[:, ::2],
        "nested": [{"same": some(3, PIECE_BYTES // 8)}, (some(2), 0.5)],
    }
    state = state_of(values, **before)
    values.protect(state, 1, 0, nothing)
    after = fetched({"a": f"127.0.0.1:{server.port}"}, state)
    for name in ("several", "half", "turned", "counts"):
        assert torch.equal(after[name], before[name])
        assert after[name].dtype == before[name].dtype
    assert np.array_equal(after["array"], before["array"])
    assert torch.equal(after["nested"][0]["same"], before["several"])
    assert torch.equal(after["nested"][1][0], some(2))
    assert server.keeper.contents.bytes < 2 * before["several"].nbytes  # what is equal is held once


def test_a_keeper_holds_what_versions_need_that_may_return(ending: contextlib.ExitStack) -> None:
    server, values = keeper("a", "es-large-versions", ending), values_at("es-large-versions", ending)
    queue, states = some(2, PIECE_BYTES // 4), []
    for version in range(6):
        queue[0, version] = -1.0  # of two pieces, one
        states.append(state_of(values, queue=queue))
        values.protect(states[-1], version, version - 2, nothing, begins=True)
    keepers = {"a": f"127.0.0.1:{server.port}"}
    assert server.keeper.contents.bytes == 4 * PIECE_BYTES  # of three versions one each, and the one that all share
    assert torch.equal(fetched(keepers, states[-1])["queue"], queue)
    assert fetched(keepers, states[3])["queue"][0, :6].tolist()[3:] != [-1.0, -1.0, -1.0]
    values.protect({}, 9, 8, nothing, begins=True)
    assert server.keeper.contents.bytes == 0


def test_a_keeper_that_was_started_again_gets_all_again(ending: contextlib.ExitStack) -> None:
    with contextlib.ExitStack() as first:
        keeper("a", "es-large-again", first)
        values = values_at("es-large-again", ending)
        queue = some(PIECE_BYTES)
        state = state_of(values, queue=queue)
        values.protect(state, 1, 0, nothing, begins=True)
    values._link._socket.close()  # type: ignore[union-attr]
    server = keeper("a", "es-large-again", ending)
    assert server.keeper.contents.bytes == 0
    values.protect(state, 2, 1, nothing, begins=True)
    assert torch.equal(fetched({"a": f"127.0.0.1:{server.port}"}, state)["queue"], queue)


def test_a_damaged_piece_is_taken_from_the_next_keeper(
    ending: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = {name: keeper(name, f"es-large-{name}", ending) for name in ("a", "b")}
    queue = some(PIECE_BYTES)
    for name in servers:
        values = values_at(f"es-large-{name}", ending)
        state = state_of(values, queue=queue)
        values.protect(state, 1, 0, nothing)
    contents = servers["a"].keeper.contents
    damaged, piece = next(iter(contents._pieces.items()))
    other = next(item for name, item in contents._pieces.items() if name != damaged)
    piece.memory, piece.start = other.memory, other.start
    keepers = {name: f"127.0.0.1:{server.port}" for name, server in servers.items()}
    assert torch.equal(fetched(keepers, state)["queue"], queue)
    monkeypatch.setattr(large_values, "LOST_S", 0.0)
    with pytest.raises(UsageError, match="1 parts of the large tensors"):
        fetched({"a": keepers["a"]}, state)


def test_what_was_not_written_to_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    values, queue, read = LargeValues(None), some(PIECE_BYTES), list[int]()

    def reads(piece: memoryview) -> str:
        read.append(len(piece))
        return digest_of(piece)

    monkeypatch.setattr(large_values, "digest_of", reads)
    first = state_of(values, queue=queue)
    assert sum(read) == queue.nbytes
    assert state_of(values, queue=queue.detach()) == first
    assert sum(read) == queue.nbytes
    for change in (lambda: queue.mul_(2), lambda: queue[5:6].zero_(), lambda: values.forget("run.state")):
        read.clear()
        change()
        again = state_of(values, queue=queue)
        assert sum(read) == queue.nbytes
        assert torch.equal(decode(again, values.give)["queue"], queue)
    assert state_of(values, queue=queue.clone()) == again


def test_a_change_that_torch_does_not_count_is_an_error() -> None:
    """In the part that is compared in this step; another one is in the next."""
    values, queue = LargeValues(None), some(2, PIECE_BYTES // 4)
    state_of(values, queue=queue)
    queue.data[1, 0] = 7
    values.check(0)
    state_of(values, queue=queue)
    with pytest.raises(UsageError, match=r"run.state\['queue'\] was changed in step 1 or before"):
        values.check(1)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (torch.zeros(9000), torch.zeros(9000, dtype=torch.int32), "tensor(dtype=int32, shape=(9000,)"),
        (torch.zeros(9000), torch.zeros(90, 100), "tensor(dtype=float32, shape=(90, 100)"),
        (torch.zeros(9000), torch.ones(9000), "tensor(dtype=float32, shape=(9000,), content "),
        (torch.zeros(9000), np.zeros(9000), "array(dtype=<f8, shape=(9000,)"),
        ({"rows": torch.zeros(9000)}, 5, "{'rows': tensor(dtype=float32, shape=(9000,)"),
    ],
)
def test_a_difference_is_named_with_types_and_shapes(one: Any, other: Any, text: str) -> None:
    states = {
        rank: {"run.state['queue']": encode(value, "it", LargeValues(None).keep)}
        for rank, value in enumerate((one, other))
    }
    found = _state_differs(3, states)
    assert found.startswith("run.state['queue'] differs in step 3: expected the same on all ranks, got ")
    assert text in found


def test_a_tensor_of_the_script_stays_the_one_in_the_state() -> None:
    """`queue = run.state.setdefault("queue", ...)` in front of the loop of a replacement, which writes to it there."""
    state, values, model = SharedState(), LargeValues(None), torch.nn.Linear(2, 2)
    queue, weight = some(9000), model.weight.detach()
    state.attach(values, model)
    state["queue"], state["weight"], state["other"] = queue, weight, torch.zeros(3)
    before = weight.clone()
    state.load_state_dict({"queue": torch.ones(9000), "weight": torch.ones(2, 2), "other": torch.ones(4)})
    queue.zero_()  # in front of the loop: it does not count
    state.begin(resumed=False)
    assert state["queue"] is queue
    assert torch.equal(queue, torch.ones(9000))
    assert torch.equal(weight, before), "the memory of the model is not the script's"
    assert torch.equal(state["weight"], torch.ones(2, 2))
    assert torch.equal(state["other"], torch.ones(4))
    assert digests_in(encode(dict(state), "run.state", values.keep))
