"""Megatron checkpoints, made by megatron-core itself in four processes: read, written, and loaded by it again."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.checkpointing.convert.core.content import ConversionError

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

SAMPLES = Path(__file__).parent / "samples"
STEPS = 3
DENSE = ("plain", "single", "reshardable", "buckets", "small-buckets")
EXPERTS = ("experts", "expert-buckets")
LOADED = ("plain", "reshardable", "buckets", "experts")
OUTPUT, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@pytest.fixture(scope="session")
def saved(megatron_samples: Path) -> Path:
    return megatron_samples


@pytest.fixture(scope="session")
def loaded(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted checkpoints, each loaded by megatron-core into a world of another shape."""
    root = tmp_path_factory.mktemp("megatron-loaded")
    for case in LOADED:
        write("megatron", read("megatron", saved / case), root / case)
    run_peer(SAMPLES / "megatron_load.py", root)
    return root


def assert_is_truth(content: Any, truth: dict[str, Any]) -> None:
    names = [name for name in truth["fp32"] if name not in content.tied]
    assert_tensors(content.params, {name: truth["fp32"][name] for name in names}, "fp32")
    for state in ("exp_avg", "exp_avg_sq"):
        assert_tensors(content.optimizer[state], {name: truth[state][name] for name in names}, state)
    assert {scalar.value for scalar in content.scalars["step"].values()} == truth["steps"] == {STEPS}
    assert set(content.scalars["step"]) == set(names)
    for name in names:
        assert content.dtypes.get(name, "float32") == str(truth["model"][name].dtype).removeprefix("torch.")
    assert sorted(name for group in content.groups for name in group["params"]) == sorted(names)
    assert content.step == STEPS
    assert set(content.notes) >= set(names)


@pytest.mark.parametrize("case", [*DENSE, *EXPERTS])
def test_reads_what_the_processes_held(saved: Path, case: str) -> None:
    content = read("megatron", saved / case)
    truth = load_truth(saved / case / "truth.pt")
    assert_is_truth(content, truth)
    for alias, name in content.tied.items():
        assert (alias, name) == (OUTPUT, EMBEDDING)
        if alias in truth["fp32"]:  # the last of several stages has its own
            assert held(truth["fp32"][alias]) == held(truth["fp32"][name])
    assert content.scheduler is not None
    assert content.extra["megatron"]["vocab_size"] == 60


@pytest.mark.parametrize("case", DENSE)
def test_reads_what_legacy_processes_held(saved: Path, case: str) -> None:
    content = read("megatron-legacy", saved / case / "legacy")
    assert_is_truth(content, load_truth(saved / case / "truth.pt"))


@pytest.mark.parametrize(
    ("folder", "form"),
    [("experts", "megatron"), ("buckets/iter_0000003", "megatron"), ("buckets/legacy", "megatron-legacy")],
)
def test_reads_alone(saved: Path, folder: str, form: str) -> None:
    assert_read_alone(saved / folder, form)


def test_both_forms_are_one_content(saved: Path) -> None:
    assert_equal_contents(
        read("megatron", saved / "buckets"),
        read("megatron-legacy", saved / "buckets" / "legacy"),
    )


@pytest.mark.parametrize("case", LOADED)
def test_megatron_loads_what_was_written(saved: Path, loaded: Path, case: str) -> None:
    truth = load_truth(saved / case / "truth.pt")
    found = load_truth(loaded / case / "loaded.pt")
    for state in ("fp32", "exp_avg", "exp_avg_sq", "model"):
        for name in set(found[state]) | set(truth[state]):
            expected = truth[state].get(name, truth[state][EMBEDDING])
            assert held(found[state].get(name, found[state][EMBEDDING])) == held(expected), (state, name)
    assert found["steps"] == truth["steps"]
    assert found["iteration"] == STEPS


@pytest.mark.parametrize("case", LOADED)
def test_round_trip_returns_the_bytes(saved: Path, loaded: Path, case: str) -> None:
    assert_equal_contents(read("megatron", saved / case), read("megatron", loaded / case))


@pytest.mark.parametrize("case", ["plain", "small-buckets", "expert-buckets"])
def test_round_trip_through_universal_returns_the_bytes(saved: Path, tmp_path: Path, case: str) -> None:
    assert_equal_contents(read("megatron", saved / case), through_universal(saved / case, tmp_path, "megatron"))


def test_legacy_becomes_distributed(saved: Path, tmp_path: Path) -> None:
    legacy = saved / "reshardable" / "legacy"
    assert_equal_contents(read("megatron-legacy", legacy), through_universal(legacy, tmp_path, "megatron"))


def test_common_state_as_newer_releases_keep_it(saved: Path, tmp_path: Path) -> None:
    """megatron-core 0.20 keeps common.pt as an object among the tensors; made here after its sources."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    folder = damaged(saved, tmp_path / "new", "reshardable")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = "common_state/shard_0_1"
    (folder / "common.pt").rename(folder / "__0_9.distcp")
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    size = (folder / "__0_9.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__0_9.distcp", 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    assert_equal_contents(read("megatron", saved / "reshardable"), read("megatron", tmp_path / "new"))


def test_names_of_transformer_engine(saved: Path, tmp_path: Path) -> None:
    local = read("megatron", saved / "plain")
    engine = read("megatron", saved / "plain", spec="transformer_engine")
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in engine.params
    assert "decoder.layers.3.input_layernorm.weight" in local.params
    assert len(local.params) == len(engine.params)
    assert set(read("megatron", write("megatron", engine, tmp_path / "out")).params) == set(engine.params)


def test_padding_goes_when_asked_and_comes_back(saved: Path, tmp_path: Path) -> None:
    cut = read("megatron", saved / "reshardable", vocabulary="60")
    assert cut.params[EMBEDDING].shape == cut.optimizer["exp_avg"][OUTPUT].shape == (60, 32)
    whole = read("megatron", write("megatron", cut, tmp_path / "out"))
    assert whole.params[EMBEDDING].shape == (64, 32)
    assert whole.params[EMBEDDING].read()[:60].tobytes() == cut.params[EMBEDDING].read().tobytes()
    assert not whole.params[EMBEDDING].read()[60:].any()


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def damaged(saved: Path, out: Path, case: str = "buckets") -> Path:
    shutil.copytree(saved / case, out)
    return out / "iter_0000003"


def test_refuses_code_in_common_state(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    torch.save({"args": Trap(tmp_path / "executed")}, folder / "common.pt")
    with pytest.raises(ConversionError, match=r"common\.pt: refused: its pickle asks for"):
        read("megatron", tmp_path / "bad")
    assert not (tmp_path / "executed").exists()


def test_refuses_code_in_metadata(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "executed")))
    with pytest.raises(ConversionError, match=r"\.metadata: refused: its pickle asks for"):
        read("megatron", tmp_path / "bad")
    assert not (tmp_path / "executed").exists()


def test_refuses_half_written(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / ".metadata").unlink()
    with pytest.raises(ConversionError, match=r"no \.metadata"):
        read("megatron", tmp_path / "bad")


def test_refuses_missing_file(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(ConversionError, match=r"__1_0\.distcp: No such file"):
        read("megatron", tmp_path / "bad")


def test_refuses_torn_file(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    with (folder / "__1_0.distcp").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ConversionError, match=r"__1_0\.distcp: torn: it has 1000 bytes"):
        read("megatron", tmp_path / "bad")


def test_refuses_mixed_iterations(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    folder.rename(folder.with_name("iter_0000004"))
    (tmp_path / "bad" / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(ConversionError, match="mixed: it holds iteration 3; its name says 4"):
        read("megatron", tmp_path / "bad")


def test_refuses_a_tracker_to_nothing(saved: Path, tmp_path: Path) -> None:
    damaged(saved, tmp_path / "bad")
    (tmp_path / "bad" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ConversionError, match=r"iter_0000007: there is no such folder"):
        read("megatron", tmp_path / "bad")


def test_refuses_other_backends(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ConversionError, match="stored by 'zarr'; expected torch_dist"):
        read("megatron", tmp_path / "bad")


def test_buckets_that_are_not_the_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    """The order in buckets is inferred: where the assumption is wrong, the weights show it."""
    content = read("megatron", saved / "buckets")
    folder = damaged(saved, tmp_path / "bad")
    for file in folder.glob("*.distcp"):  # the sign of one bias
        data = bytearray(file.read_bytes())
        weight = content.params["decoder.layers.1.mlp.linear_fc2.bias"].read().tobytes()
        at = data.find(weight[:64])
        if at >= 0:
            data[at + 3] ^= 0x80
            file.write_bytes(bytes(data))
    changed = read("megatron", tmp_path / "bad")
    with pytest.raises(ConversionError, match="is not the model's weight"):
        changed.params["decoder.layers.1.mlp.linear_fc2.bias"].read()


def test_legacy_refuses_missing_rank(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad") / "../legacy/iter_0000003"
    shutil.rmtree(folder / "mp_rank_01_001")
    with pytest.raises(ConversionError, match=r"3 ranks; expected 4; missing: mp_rank_01_001"):
        read("megatron-legacy", folder)


def test_legacy_refuses_mixed_iterations(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad", "plain") / "../legacy/iter_0000003"
    file = folder / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"iteration": 2}, file)
    with pytest.raises(ConversionError, match="mixed: iteration 2, but mp_rank_00_000 has 3"):
        read("megatron-legacy", folder)


def test_legacy_refuses_code(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad", "plain") / "../legacy/iter_0000003"
    torch.save(Trap(tmp_path / "executed"), folder / "mp_rank_01_001" / "model_optim_rng.pt")
    with pytest.raises(ConversionError, match="refused"):
        read("megatron-legacy", folder)
    assert not (tmp_path / "executed").exists()


def test_legacy_refuses_replicas_that_differ(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad", "plain") / "../legacy/iter_0000003"
    file = folder / "mp_rank_01_000" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["optimizer"]["fp32_from_fp16_params"][1][0].data += 1
    state["model"]["decoder.layers.0.input_layernorm.weight"] += 1
    torch.save(state, file)
    content = read("megatron-legacy", folder)
    with pytest.raises(ConversionError, match=r"decoder\.layers\.0\.input_layernorm\.weight: replicated, but rank 1"):
        content.params["decoder.layers.0.input_layernorm.weight"].read()
