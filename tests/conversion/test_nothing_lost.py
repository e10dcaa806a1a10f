"""A conversion drops nothing and guesses nothing: kinds of checkpoints of which parts could be lost or mistaken, each
converted as a user does it.

Those of DeepSpeed and Megatron, and the sharded safetensors, were written by the libraries themselves and are kept in
`data`, with what the live processes held.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from everstep.checkpointing.convert.core.content import Content, Lazy
from everstep.checkpointing.convert.formats.huggingface import format as huggingface
from everstep.checkpointing.universal.dtypes import NAMES
from everstep.checkpointing.universal.reader import open_checkpoint
from everstep.checkpointing.universal.store import LocalStore, ObjectStore

from ..jobs.peers import run_peer
from .commands import Commands, safetensors
from .comparing import assert_tensors, read

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # saved by one process
DATA = Path(__file__).parent / "data"
LONG = "layer." * 50 + "weight"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints in `data`, unpacked."""
    root = tmp_path_factory.mktemp("kept")
    for path in sorted(DATA.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            archive.extractall(root, filter="data")
    return root


def save(folder: Path, state: dict[str, Any]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def trained(names: dict[str, tuple[int, ...]], *, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A model's parameters, and its optimizer's state by their names, as torch nests them."""
    generator = torch.Generator().manual_seed(seed)
    model = {name: torch.rand(shape, generator=generator) for name, shape in names.items()}
    state = {
        name: {"step": torch.tensor(3.0), "exp_avg": value * 2, "exp_avg_sq": value * value}
        for name, value in model.items()
    }
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": list(model)}
    return model, {"state": state, "param_groups": [group]}


SHAPES = {"up.weight": (4, 3), "up.bias": (4,)}


# ------------------------------------------------------------ copies of the model, and what is beside it


def test_a_second_copy_of_the_model_is_not_taken_for_it(tmp_path: Path, run: Commands) -> None:
    model, optimizer = trained(SHAPES)
    average = {name: value - 1 for name, value in model.items()}
    source = save(tmp_path / "in", {"ema": average, "model": model, "optimizer": optimizer})
    ended = run("convert", source, tmp_path / "out", "--to", "universal")
    assert ended.status == 0
    assert "holds the model's parameters 2 times, at 'ema' and at 'model': those at 'model' are taken" in ended.stderr
    content = read_universal(tmp_path / "out")
    assert_tensors(content.params, model, "params")
    assert_tensors(content.other, {f"ema.{name}": value for name, value in average.items()}, "other")
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "dcp")
    run.done("diff", tmp_path / "back", source)
    run.done("convert", source, tmp_path / "average", "--to", "universal", "--set", "model=ema")
    assert_tensors(read_universal(tmp_path / "average").params, average, "params")


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_of_two_copies_that_nothing_tells_apart_neither_is_taken(
    with_optimizer: bool, tmp_path: Path, run: Commands
) -> None:
    model, optimizer = trained(SHAPES)
    copy = {name: value - 1 for name, value in model.items()}
    state = {"student": model, "teacher": copy, **({"optimizer": optimizer} if with_optimizer else {})}
    source = save(tmp_path / "in", state)
    message = run.refused(source)
    assert "2 times, at 'student' and at 'teacher'" in message
    assert "--set model=KEY" in message
    run.done("convert", source, tmp_path / "out", "--to", "universal", "--set", "model=student")
    content = read_universal(tmp_path / "out")
    assert_tensors(content.params, model, "params")
    assert set(content.other) == {"teacher.up.weight", "teacher.up.bias"}
    assert "--set model=pupil" in run.refused(source, "--set", "model=pupil")


def test_the_top_can_be_chosen(tmp_path: Path, run: Commands) -> None:
    model, _ = trained(SHAPES)
    source = save(tmp_path / "in", {**model, "average": {name: value - 1 for name, value in model.items()}})
    assert "2 times, at the top and at 'average'" in run.refused(source)
    run.done("convert", source, tmp_path / "out", "--to", "universal", "--set", "model=")
    content = read_universal(tmp_path / "out")
    assert_tensors(content.params, model, "params")
    assert set(content.other) == {"average.up.weight", "average.up.bias"}


def test_parts_of_a_model_are_told_from_copies_by_the_user(tmp_path: Path, run: Commands) -> None:
    parts = {"encoder": {"weight": torch.rand(3, 2)}, "decoder": {"weight": torch.rand(2, 3)}}
    source = save(tmp_path / "in", parts)
    assert "which are the model's is not said" in run.refused(source)
    run.done("convert", source, tmp_path / "out", "--to", "universal", "--set", "model=.")
    assert set(read_universal(tmp_path / "out").params) == {"encoder.weight", "decoder.weight"}


def test_tensors_beside_the_model_are_kept_or_refused_by_name(tmp_path: Path, run: Commands) -> None:
    model, optimizer = trained(SHAPES)
    beside = {"rng": torch.arange(40, dtype=torch.uint8), "dataloader": {"perm": torch.arange(5000), "at": 7}}
    source = save(tmp_path / "in", {"model": model, "optimizer": optimizer, **beside})
    ended = run("convert", source, tmp_path / "out", "--to", "universal")
    assert "rng" in ended.stderr
    assert "dataloader.perm" in ended.stderr
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "dcp")
    run.done("diff", source, tmp_path / "back")
    loaded = {"rng": torch.zeros(40, dtype=torch.uint8), "dataloader": {"perm": torch.zeros(5000, dtype=torch.int64)}}
    dcp.load(loaded, checkpoint_id=tmp_path / "back", no_dist=True)
    assert torch.equal(loaded["rng"], beside["rng"])
    assert torch.equal(loaded["dataloader"]["perm"], torch.arange(5000))
    for to in ("hf", "deepspeed", "deepspeed-universal"):
        message = run.refused(source, to=to)
        assert f"{to} has no place for tensors that are neither the model's nor an optimizer's" in message
        assert "rng" in message
        assert "dataloader.perm" in message
    dropping = ("--drop", "rng", "--drop", "dataloader.*", "--drop", "nothing*")
    ended = run("convert", source, tmp_path / "hf", "--to", "hf", *dropping)
    assert ended.status == 0
    assert "left out: rng (--drop rng)" in ended.stderr
    assert "left out: dataloader.perm (--drop dataloader.*)" in ended.stderr
    assert "left out: the optimizer's states (exp_avg, exp_avg_sq, step) and settings" in ended.stderr
    assert "--drop nothing*: names nothing" in ended.stderr
    assert json.loads(run.done("inspect", source, "--json"))["unknown"] == []


def test_what_is_not_understood_is_an_error_that_names_it(tmp_path: Path, run: Commands) -> None:
    model, optimizer = trained(SHAPES)
    source = save(tmp_path / "in", {"model": model, "optimizer": optimizer, "history": {"losses": np.arange(3.0)}})
    assert "not understood, and it would be lost: history.losses" in run.refused(source)
    assert "history.losses" in json.loads(run.done("inspect", source, "--json"))["unknown"][0]
    ended = run("convert", source, tmp_path / "out", "--to", "universal", "--drop", "history.*")
    assert ended.status == 0
    assert "left out: history.losses" in ended.stderr


def test_states_of_other_shapes_than_their_parameters_are_kept(tmp_path: Path, run: Commands) -> None:
    """Factored second moments, as Adafactor keeps them."""
    model, optimizer = trained(SHAPES)
    optimizer["state"]["up.weight"]["row"] = torch.rand(4)
    source = save(tmp_path / "in", {"model": model, "optimizer": optimizer})
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    assert set(read_universal(tmp_path / "out").other) == {"optimizer.state.up.weight.row"}
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "dcp")
    run.done("diff", source, tmp_path / "back")


def test_several_optimizers_are_kept_apart(tmp_path: Path, run: Commands) -> None:
    model, adam = trained(SHAPES)
    muon_group = {"lr": 0.02, "momentum": 0.95, "params": ["up.weight"]}
    muon = {"state": {"up.weight": {"momentum_buffer": model["up.weight"] * 3}}, "param_groups": [muon_group]}
    del adam["state"]["up.weight"]
    adam["param_groups"][0]["params"] = ["up.bias"]
    state = {"model": model, "optimizers": {"adam": adam, "muon": muon}}
    source = save(tmp_path / "in", state)
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    content = read_universal(tmp_path / "out")
    assert_tensors(content.optimizer["momentum_buffer"], {"up.weight": model["up.weight"] * 3}, "muon")
    assert {name: group["lr"] for group in content.groups for name in group["params"]} == {
        "up.weight": 0.02,
        "up.bias": 0.1,
    }
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "dcp")
    run.done("diff", source, tmp_path / "back")
    loaded = {"optimizers": {"muon": {"param_groups": [{"lr": 0.0, "momentum": 0.0, "params": [""]}]}}}
    dcp.load(loaded, checkpoint_id=tmp_path / "back", no_dist=True)
    assert loaded["optimizers"]["muon"]["param_groups"] == [muon_group]
    assert "deepspeed has one optimizer, and the source has 2: optimizers.adam, optimizers.muon" in run.refused(
        source, to="deepspeed"
    )
    run.done("convert", source, tmp_path / "weights", "--to", "deepspeed", "--drop", "optimizer/*")
    twice = save(tmp_path / "twice", {"model": model, "one": trained(SHAPES)[1], "two": trained(SHAPES)[1]})
    assert "two optimizers have" in run.refused(twice)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_of_wrappers_are_left_off(wrapper: str, tmp_path: Path, run: Commands) -> None:
    plain, optimizer = trained(SHAPES)
    wrapped, of_wrapped = trained({f"{wrapper}.up.{wrapper}.weight": (4, 3), f"{wrapper}.up.{wrapper}.bias": (4,)})
    one = save(tmp_path / "one", {"model": wrapped, "optimizer": of_wrapped})
    two = save(tmp_path / "two", {"model": plain, "optimizer": optimizer})
    ended = run("convert", one, tmp_path / "out", "--to", "universal")
    assert ended.status == 0
    assert ended.stderr.count("names of a wrapped module") == 1
    run.done("diff", tmp_path / "out", two)
    assert {name for group in read_universal(tmp_path / "out").groups for name in group["params"]} == set(SHAPES)
    both = save(tmp_path / "both", {"model": {**plain, f"{wrapper}.up.weight": plain["up.weight"]}})
    assert "holds up.weight twice" in run.refused(both)


# ------------------------------------------------------------ tensors and names


def test_conjugated_and_negated_views_are_resolved(tmp_path: Path, run: Commands) -> None:
    one, two, three = (torch.rand(4, 3, dtype=torch.complex64) for _ in range(3))
    state = {"conj": one.conj(), "negative": two.conj().imag, "part": three.conj()[1:, ::2].T}
    save(tmp_path / "dcp", {"model": state})
    (tmp_path / "hf").mkdir()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    expected = {name: value.resolve_conj().resolve_neg().contiguous() for name, value in state.items()}
    for form in ("dcp", "hf"):
        run.done("convert", tmp_path / form, tmp_path / f"{form}-out", "--to", "universal")
        content = read_universal(tmp_path / f"{form}-out")
        assert_tensors({**content.params, **content.buffers}, expected, form)


@pytest.mark.parametrize("dtype", NAMES)
def test_every_element_type_goes_there_and_back(dtype: str, tmp_path: Path, run: Commands) -> None:
    raw = torch.arange(96, dtype=torch.uint8)
    value = raw.view(getattr(torch, dtype)) if dtype != "bool" else raw % 2 == 0
    source = save(tmp_path / "in", {"model": {"w": value}})
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "dcp")
    run.done("diff", source, tmp_path / "back")


@pytest.mark.parametrize("dtype", ["complex32", "float8_e8m0fnu"])
def test_element_types_that_are_not_known_are_named(dtype: str, tmp_path: Path, run: Commands) -> None:
    value = torch.zeros(12, dtype=torch.uint8).view(getattr(torch, dtype))
    source = save(tmp_path / "in", {"model": {"w": value}})
    assert f"w: element type {dtype} is not known" in run.refused(source)
    (tmp_path / "hf").mkdir()
    torch.save({"w": value}, tmp_path / "hf" / "pytorch_model.bin")
    assert f"element type, {dtype}, is not known" in run.refused(tmp_path / "hf")


@pytest.mark.parametrize("name", [LONG, "ä" * 100 + ".weight", "a/b" * 100, LONG + "2"])
def test_names_that_no_file_system_takes(name: str, tmp_path: Path, run: Commands) -> None:
    model, optimizer = trained({name: (4, 3), LONG[:-6] + "bias": (4,)})
    source = save(tmp_path / "in", {"model": model, "optimizer": optimizer})
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    assert run.done("verify", tmp_path / "out").endswith(": whole\n")
    assert_tensors(read_universal(tmp_path / "out").params, model, "params")
    for to in ("dcp", "hf"):
        run.done("convert", tmp_path / "out", tmp_path / to, "--to", to)
    run.done("diff", source, tmp_path / "dcp")
    run.done("diff", "--params", source, tmp_path / "hf")


# ------------------------------------------------------------ safetensors of torch's distributed save


def test_shards_of_a_distributed_save_are_put_together(kept: Path, tmp_path: Path, run: Commands) -> None:
    folder = kept / "hf-distributed-save"
    ended = run("convert", folder, tmp_path / "out", "--to", "universal")
    assert ended.status == 0
    assert "put together of 2 shards" in ended.stderr
    truth = torch.load(folder / "truth.pt", weights_only=True)
    assert_tensors(read_universal(tmp_path / "out").params, truth, "params")


def test_one_shard_is_not_read_as_if_it_were_whole(kept: Path, tmp_path: Path, run: Commands) -> None:
    for number in (1, 2):
        name = f"shard-0000{number}-model-00001-of-00001.safetensors"
        alone = kept / "hf-distributed-save" / name
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_bytes(alone.read_bytes())
        assert "is one shard of a distributed save" in run.refused(tmp_path / str(number) / name)
    assert "shard 1 is missing" in run.refused(tmp_path / "2")


def test_files_beside_the_weights_are_listed(tmp_path: Path, run: Commands) -> None:
    """A second copy of the weights, a trainer's optimizer, a tokenizer: none of them is read."""
    folder = safetensors(tmp_path / "in" / "model.safetensors", {"a.weight": (4, 3)})
    safetensors(folder / "ema.safetensors", {"a.weight": (4, 3)}, seed=1)
    for name in ("optimizer.pt", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "config.json").write_text("{}")
    ended = run("convert", folder, tmp_path / "out", "--to", "universal")
    assert "left out: ema.safetensors, optimizer.pt, tokenizer.json (files beside the weights" in ended.stderr
    assert "left out" not in run("convert", folder / "ema.safetensors", tmp_path / "ema", "--to", "universal").stderr


def test_names_that_a_rule_leaves_out_are_listed(tmp_path: Path, run: Commands) -> None:
    folder = safetensors(tmp_path / "in" / "model.safetensors", {"a.weight": (4, 3), "b.inv_freq": (2,)})
    rules = tmp_path / "rules.toml"
    rules.write_text('[[name]]\na = "a.weight"\nb = "c.weight"\n[[name]]\na = "b.inv_freq"\n')
    ended = run("convert", folder, tmp_path / "out", "--to", "universal", "--names", rules)
    assert ended.status == 0, ended
    assert "left out: b.inv_freq (rules.toml" in ended.stderr
    assert set(read_universal(tmp_path / "out").params) == {"c.weight"}


# ------------------------------------------------------------ DeepSpeed and Megatron


def truths(folder: Path, key: str) -> dict[str, torch.Tensor]:
    """The state of the live engines, all ranks merged."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("truth_*.pt")):
        found.update(torch.load(path, weights_only=True)[key])
    return found


def moments(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(folder.glob("truth_*.pt")):
        for state, tensors in torch.load(path, weights_only=True)["opt"].items():
            found.setdefault(state, {}).update(tensors)
    return found


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("deepspeed-pipeline-bf16-without-zero", ()),
        ("deepspeed-pipeline-frozen", ()),
        ("deepspeed-other-states", ()),
        ("deepspeed-unstepped", ("--set", "frozen=^frozen")),
        ("deepspeed-elastic", ()),
    ],
)
def test_deepspeed_as_its_engines_held_it(
    case: str, settings: tuple[str, ...], kept: Path, tmp_path: Path, run: Commands
) -> None:
    run.done("convert", kept / case, tmp_path / "out", "--to", "universal", *settings)
    content = read_universal(tmp_path / "out")
    assert_tensors(content.params, truths(kept / case, "fp32"), "params")
    assert_tensors(content.frozen, truths(kept / case, "frozen"), "frozen")
    for state, tensors in moments(kept / case).items():
        assert_tensors(content.optimizer[state], tensors, state)
    for to in ("deepspeed-universal", "dcp"):
        run.done("convert", tmp_path / "out", tmp_path / to, "--to", to)
        run.done("diff", tmp_path / "out", tmp_path / to)


def test_states_that_are_one_number_by_other_names(kept: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", kept / "deepspeed-other-states", tmp_path / "out", "--to", "universal")
    assert set(read_universal(tmp_path / "out").scalars) == {"integer_step", "tensor_step"}


def test_a_checkpoint_of_before_the_first_step_needs_what_is_frozen(kept: Path, run: Commands, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.symlink_to(kept / "deepspeed-unstepped")
    assert "say which are frozen: --set frozen=EXPRESSION" in run.refused(source)


def test_settings_that_a_checkpoint_does_not_keep_are_missed(kept: Path, tmp_path: Path, run: Commands) -> None:
    """An engine takes its groups' settings from a checkpoint; without betas it would fail in its first step."""
    ended = run("convert", kept / "deepspeed-elastic", tmp_path / "out", "--to", "universal")
    assert "keeps no settings of the optimizer" in ended.stderr
    assert "keeps no settings of the optimizer's groups" in run.refused(tmp_path / "out", to="deepspeed")


def test_experts_are_refused_where_they_would_be_taken_for_others(kept: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", kept / "deepspeed-experts", tmp_path / "out", "--to", "universal")
    for to in ("deepspeed", "deepspeed-universal"):
        assert "are experts: DeepSpeed keeps them by the numbers" in run.refused(tmp_path / "out", to=to)
    source = tmp_path / "in"
    source.symlink_to(kept / "deepspeed-experts-without-zero")
    assert "experts without ZeRO" in run.refused(source)


def test_parameters_dealt_round_robin_are_the_modules(kept: Path, tmp_path: Path, run: Commands) -> None:
    """DeepSpeed's own map of such a checkpoint is wrong: masters must round to the weights that the module has."""
    folder = kept / "deepspeed-round-robin" / "global_step3"
    run.done("convert", folder, tmp_path / "out", "--to", "universal")
    content = read_universal(tmp_path / "out")
    module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    for name, tensor in content.params.items():
        assert torch.equal(torch.from_numpy(tensor.read()).bfloat16(), module[name]), name
    order = [name for name in module if name in content.params and len(content.params[name].shape) > 1]
    assert content.groups[0]["params"] == order
    run.done("convert", tmp_path / "out", tmp_path / "two", "--to", "deepspeed", "--set", "dp=2")
    run.done("diff", tmp_path / "two", tmp_path / "out")
    for rank in range(2):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        ours, theirs = (flats(root / "global_step3" / name) for root in (tmp_path / "two", folder.parent))
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    run.done("convert", tmp_path / "out", tmp_path / "three", "--to", "deepspeed", "--set", "dp=3")
    run.done("diff", tmp_path / "three", tmp_path / "out")
    ended = run("convert", tmp_path / "out", tmp_path / "all", "--to", "deepspeed-universal")
    assert "load it with round_robin_gradients false" in ended.stderr


def flats(path: Path) -> list[torch.Tensor]:
    """The flat tensors of one rank: parameters and moments by group."""
    content = read("deepspeed", path.parent)  # it is whole
    assert content.params
    from everstep.checkpointing.convert.files.torchfile import load

    state = load(path)["optimizer_state_dict"]
    found = list(state["single_partition_of_fp32_groups"])
    for group in sorted(state["base_optimizer_state"]["state"]):
        each = state["base_optimizer_state"]["state"][group]
        found += [each["exp_avg"], each["exp_avg_sq"]]
    return [torch.from_numpy(tensor.read()) for tensor in found]


@pytest.mark.parametrize("case", ["z1-bf16-grads", "pp2-z0-fp32"])
def test_other_optimizers_of_deepspeed(case: str, deepspeed_kinds: Path, tmp_path: Path, run: Commands) -> None:
    """BF16 with gradients accumulated in float32; a pipeline in float32 without ZeRO: its optimizers have no names."""
    run.done("convert", deepspeed_kinds / case, tmp_path / "out", "--to", "universal")
    content = read_universal(tmp_path / "out")
    assert_tensors(content.params, truths(deepspeed_kinds / case, "fp32"), "params")
    assert_tensors(content.frozen, truths(deepspeed_kinds / case, "frozen"), "frozen")
    for state in ("exp_avg", "exp_avg_sq"):
        found = truths(deepspeed_kinds / case, state)
        assert set(content.optimizer[state]) == set(content.params)
        assert_tensors({name: content.optimizer[state][name] for name in found}, found, state)
    assert {scalar.value for scalar in content.scalars["step"].values()} == {3.0}
    assert {name for group in content.groups for name in group["params"]} == content.params.keys()


def test_an_engine_that_deals_round_robin_loads_what_we_write(
    deepspeed_kinds: Path, tmp_path: Path, run: Commands
) -> None:
    run.done("convert", deepspeed_kinds / "z1-robin-bf16", tmp_path / "out", "--to", "universal")
    run.done("convert", tmp_path / "out", tmp_path / "resume-robin-bf16", "--to", "deepspeed", "--set", "dp=2")
    run_peer(DATA.parent / "samples" / "deepspeed_samples.py", tmp_path, "2", "resume-robin-bf16")
    for key in ("module", "fp32", "exp_avg", "exp_avg_sq"):
        saved = truths(deepspeed_kinds / "z1-robin-bf16", key)
        loaded = truths(tmp_path / "resume-robin-bf16", key)
        assert saved
        assert all(torch.equal(loaded[name], value) for name, value in saved.items()), key


def test_an_engine_keeps_its_settings_where_a_checkpoint_has_none(
    deepspeed_kinds: Path, tmp_path: Path, run: Commands
) -> None:
    """It trains a step after loading, which it could not without betas."""
    saved = deepspeed_kinds / "z2-elastic-bf16"
    run.done("convert", saved, tmp_path / "load-z2-bf16", "--to", "deepspeed-universal")
    run_peer(DATA.parent / "samples" / "deepspeed_samples.py", tmp_path, "2", "load-z2-bf16")
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        before, after = truths(saved, key), truths(tmp_path / "load-z2-bf16", key)
        assert before
        assert all(torch.equal(after[name], value) for name, value in before.items()), key


def test_masters_that_are_not_the_modules_weights_are_refused(kept: Path, tmp_path: Path, run: Commands) -> None:
    """Megatron saved the masters of an embedding that two stages share shifted by 64 elements."""
    source = tmp_path / "in"
    source.symlink_to(kept / "megatron-tied-stages" / "ckpt")
    ended = run("convert", source, tmp_path / "out", "--to", "universal")
    assert ended.status == 1
    assert "error: embedding.word_embeddings.weight: the master weight is not the module's weight" in ended.stderr
    assert not (tmp_path / "out").exists()
    run.done("convert", source, tmp_path / "out", "--to", "universal", "--set", "masters=trust")
    assert "--set masters=maybe: expected trust" in run("inspect", source, "--set", "masters=maybe").error()


def test_each_parameter_is_in_one_group_of_megatrons(kept: Path, tmp_path: Path, run: Commands) -> None:
    run.done("convert", kept / "megatron-decoupled-rates" / "ckpt", tmp_path / "out", "--to", "universal")
    content = read_universal(tmp_path / "out")
    truth = torch.load(kept / "megatron-decoupled-rates" / "truth.pt", weights_only=True)
    names = [name for group in content.groups for name in group["params"]]
    assert sorted(names) == sorted(content.params) == sorted(truth["st"]["fp32"])
    assert_tensors(content.params, truth["st"]["fp32"], "params")
    rates = {name: group["max_lr"] for group in content.groups for name in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.005} == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }


def test_what_users_save_beside_a_deepspeed_model_is_kept(kept: Path, tmp_path: Path, run: Commands) -> None:
    source = tmp_path / "in"
    shutil.copytree(kept / "deepspeed-other-states", source)
    path = source / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    average = torch.rand(100, 100)
    torch.save({**state, "ema": {"weight": average, "decay": 0.9}}, path)
    run.done("convert", source, tmp_path / "out", "--to", "universal")
    assert_tensors(read_universal(tmp_path / "out").other, {"client_state.ema.weight": average}, "other")
    run.done("convert", tmp_path / "out", tmp_path / "back", "--to", "deepspeed")
    found = torch.load(tmp_path / "back" / "global_step3" / path.name, weights_only=True)["ema"]
    assert torch.equal(found["weight"], average)
    assert found["decay"] == 0.9
    assert "client_state.ema.weight" in run.refused(tmp_path / "out", to="hf")
    torch.save({**state, "data_sampler": {"at": 3}}, path)
    assert "not understood, and it would be lost: data_sampler" in run.refused(source)
    torch.save({**state, "module": {**state["module"], "norm._extra_state": {"scale": 3}}}, path)
    assert "not understood, and it would be lost: norm._extra_state" in run.refused(source)


@pytest.mark.parametrize(
    ("form", "source", "through"),
    [
        ("deepspeed", "deepspeed-pipeline-frozen", "dcp"),
        ("megatron", "megatron-decoupled-rates/ckpt", "dcp"),
        ("megatron", "megatron-decoupled-rates/ckpt", "deepspeed"),
        ("megatron", "megatron-decoupled-rates/ckpt", "deepspeed-universal"),
    ],
)
def test_settings_of_another_framework_come_back(
    form: str, source: str, through: str, kept: Path, tmp_path: Path, run: Commands
) -> None:
    run.done("convert", kept / source, tmp_path / "one", "--to", "universal")
    run.done("convert", tmp_path / "one", tmp_path / "other", "--to", through)
    run.done("convert", tmp_path / "other", tmp_path / "two", "--to", "universal")
    one, two = read_universal(tmp_path / "one"), read_universal(tmp_path / "two")
    assert two.extra[form] == one.extra[form]
    for attribute in ("dtypes", "layers", "scheduler", "tied", "groups"):
        assert getattr(two, attribute) == getattr(one, attribute), attribute


# ------------------------------------------------------------ what was written is read again


def test_what_reads_back_otherwise_is_not_put_in_place(
    tmp_path: Path, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = safetensors(tmp_path / "in" / "model.safetensors", {"a.weight": (4, 3), "b.weight": (2, 2)})
    right = huggingface._data

    def wrong(tensor: Lazy, dtype: str) -> Any:
        def data() -> bytes:
            found = bytearray(right(tensor, dtype)())
            found[-1] ^= 1
            return bytes(found)

        return data

    monkeypatch.setattr(huggingface, "_data", wrong)
    message = run.refused(source, to="hf")
    assert "what was written reads back otherwise: weight/" in message
    run.done("convert", source, tmp_path / "unseen", "--to", "hf", "--no-verify")
    monkeypatch.undo()
    assert run("diff", source, tmp_path / "unseen").status == 1


def test_a_universal_checkpoint_is_read_again_too(
    tmp_path: Path, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = safetensors(tmp_path / "in" / "model.safetensors", {"a.weight": (4, 3)})
    put = LocalStore.put

    def torn(self: LocalStore, path: str, pieces: Any) -> None:
        put(self, path, [b"\x01" + b"".join(map(bytes, pieces))[1:]] if "/c/" in path else pieces)

    monkeypatch.setattr(LocalStore, "put", torn)
    assert "what was written reads back otherwise" in run.refused(source)
    run.done("convert", source, tmp_path / "unseen", "--to", "universal", "--no-verify")


def test_what_reads_back_otherwise_at_a_url_is_no_checkpoint(
    tmp_path: Path, run: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = safetensors(tmp_path / "in" / "model.safetensors", {"a.weight": (4, 3)})
    url = f"memory://{tmp_path.parent.name}-{tmp_path.name}"
    put = ObjectStore.put

    def torn(self: ObjectStore, path: str, pieces: Any) -> None:
        put(self, path, [b"\x01" + b"".join(map(bytes, pieces))[1:]] if "/c/" in path else pieces)

    monkeypatch.setattr(ObjectStore, "put", torn)
    assert "what was written reads back otherwise" in run("convert", source, url, "--to", "universal").error()
    assert "not an everstep checkpoint" in run("verify", url).error()
    monkeypatch.undo()
    run.done("convert", source, url, "--to", "universal")
    run.done("verify", url)


def read_universal(path: Path) -> Content:
    from everstep.checkpointing.convert.formats import universal

    return universal.contents(open_checkpoint(str(path)))
