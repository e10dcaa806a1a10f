"""torch's own distributed checkpoints: of FSDP2 in two processes, read, written, and loaded by torch again."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)

from ..jobs.peers import run_peer
from .comparing import (
    assert_equal_contents,
    assert_read_alone,
    assert_tensors,
    held,
    load_truth,
    read,
    through_universal,
    write,
)

SCRIPT = Path(__file__).parent / "samples" / "fsdp_samples.py"
STEPS = 3
WITH_OPTIMIZER = ("nested", "flat")
CASES = (*WITH_OPTIMIZER, "bare", "safetensors")


@pytest.fixture(scope="session")
def saved(fsdp_samples: Path) -> Path:
    return fsdp_samples


@pytest.fixture(scope="session")
def loaded(saved: Path) -> Path:
    for case in CASES:
        write("dcp", read("dcp", saved / case / "checkpoint"), saved / case / "converted")
    run_peer(SCRIPT, "load", saved)
    return saved


@pytest.mark.parametrize("case", WITH_OPTIMIZER)
def test_reads_what_the_processes_held(saved: Path, case: str) -> None:
    content = read("dcp", saved / case / "checkpoint")
    truth = load_truth(saved / case / "truth.pt")
    assert_tensors({**content.params, **content.frozen}, truth["params"], "params")
    assert set(content.frozen) == {"fixed.weight", "fixed.bias"}
    assert_tensors(content.buffers, truth["buffers"], "buffers")
    for state in ("exp_avg", "exp_avg_sq"):
        assert_tensors(content.optimizer[state], truth[state], state)
    assert {scalar.value for scalar in content.scalars["step"].values()} == truth["steps"] == {STEPS}
    assert content.step == STEPS
    assert content.tied == {"head.weight": "embedding.weight"}
    assert [(group["weight_decay"], group["betas"]) for group in content.groups] == [
        (0.1, [0.9, 0.95]),
        (0.0, [0.9, 0.95]),
    ]
    assert sorted(name for group in content.groups for name in group["params"]) == sorted(content.params)


@pytest.mark.parametrize("case", ["bare", "safetensors"])
def test_reads_models_alone(saved: Path, case: str) -> None:
    content = read("dcp", saved / case / "checkpoint")
    truth = load_truth(saved / case / "truth.pt")
    everything = {**truth["params"], **truth["buffers"]}
    if case == "bare":
        everything["head.weight"] = everything["embedding.weight"]  # nothing says that they are one
    assert_tensors({**content.params, **content.buffers}, everything, case)
    assert not content.optimizer


def test_reads_alone(saved: Path) -> None:
    assert_read_alone(saved / "nested" / "checkpoint", "dcp")


@pytest.mark.parametrize("case", [*WITH_OPTIMIZER, "bare"])
def test_torch_loads_what_was_written(loaded: Path, case: str) -> None:
    truth, found = load_truth(loaded / case / "truth.pt"), load_truth(loaded / case / "loaded.pt")
    rooms = ("params", "buffers") if case == "bare" else ("params", "buffers", "exp_avg", "exp_avg_sq")
    for room in rooms:
        assert truth[room].keys() == found[room].keys()
        for name, tensor in truth[room].items():
            assert held(tensor) == held(found[room][name]), (room, name)
    if case != "bare":
        assert found["steps"] == truth["steps"]
        assert [group["betas"] for group in found["groups"]] == [(0.9, 0.95)] * 2


@pytest.mark.parametrize("case", CASES)
def test_round_trip_returns_the_bytes(loaded: Path, case: str) -> None:
    first, second = read("dcp", loaded / case / "checkpoint"), read("dcp", loaded / case / "converted")
    assert_equal_contents(first, second)
    assert first.extra == second.extra


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_universal_returns_the_bytes(saved: Path, tmp_path: Path, case: str) -> None:
    source = saved / case / "checkpoint"
    assert_equal_contents(read("dcp", source), through_universal(source, tmp_path, "dcp"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_came_from_elsewhere_is_a_model_and_an_optimizer(tmp_path: Path) -> None:
    weight, moment = torch.arange(12.0).reshape(3, 4), torch.full((3, 4), 0.5, dtype=torch.bfloat16)
    content = Content(
        step=7,
        params={"a.weight": Lazy((3, 4), "float32", weight.numpy, "")},
        optimizer={"exp_avg": {"a.weight": Lazy((3, 4), "bfloat16", lambda: bits(moment), "")}},
        scalars={"step": {"a.weight": Scalar("int64", 7)}},
        groups=[{"params": ["a.weight"], "lr": 0.5, "betas": [0.9, 0.99]}],
    )
    write("dcp", content, tmp_path / "out")
    state: dict[str, Any] = {
        "model": {"a.weight": torch.zeros(3, 4)},
        "optimizer": {"state": {"a.weight": {"exp_avg": moment * 0, "step": torch.tensor(0.0)}}},
        "step": 0,
    }
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(state["model"]["a.weight"], weight)
    assert torch.equal(state["optimizer"]["state"]["a.weight"]["exp_avg"], moment)
    assert state["optimizer"]["state"]["a.weight"]["step"] == 7
    assert state["step"] == 7


def bits(tensor: torch.Tensor) -> Any:
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def damaged(saved: Path, out: Path) -> Path:
    shutil.copytree(saved / "nested" / "checkpoint", out)
    return out


def test_refuses_half_written(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / ".metadata").unlink()
    with pytest.raises(ConversionError, match=r"no \.metadata: not a torch distributed checkpoint, or one half"):
        read("dcp", folder)


def test_refuses_torn_metadata(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:500])
    with pytest.raises(ConversionError, match=r"\.metadata: its pickle cannot be read"):
        read("dcp", folder)


def test_refuses_missing_file(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(ConversionError, match=r"__1_0\.distcp: No such file"):
        read("dcp", folder)


def test_refuses_torn_file(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    with (folder / "__1_0.distcp").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(ConversionError, match=r"__1_0\.distcp: torn: it has 100 bytes; expected"):
        read("dcp", folder)


def test_refuses_new_data_under_old_metadata(saved: Path, tmp_path: Path) -> None:
    """As a run leaves it that was killed while it saved over a checkpoint."""
    folder = damaged(saved, tmp_path / "bad")
    file = folder / "__1_0.distcp"
    file.write_bytes(bytes(100) + file.read_bytes())
    content = read("dcp", saved / "nested" / "checkpoint")
    assert content.step == STEPS
    with pytest.raises(ConversionError, match=r"__1_0\.distcp at byte"):
        read("dcp", folder).params["embedding.weight"].read()


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_refuses_code(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(ConversionError, match="refused: its pickle asks for"):
        read("dcp", folder)
    assert not (tmp_path / "executed").exists()


def test_refuses_files_outside(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.replace(b"__1_0.distcp", b"../../../xyz"))
    with pytest.raises(ConversionError, match=r"scale is at .*expected a file in the checkpoint's folder"):
        read("dcp", folder)
