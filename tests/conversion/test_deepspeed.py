"""DeepSpeed's checkpoints against the engines that wrote them, bit for bit; and its engines on our checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy
from everstep.checkpointing.convert.core.format import Format, Options, detect
from everstep.checkpointing.convert.core.work import PieceWork
from everstep.checkpointing.convert.files.torchfile import load
from everstep.checkpointing.convert.formats.deepspeed import format as deepspeed
from everstep.checkpointing.convert.formats.deepspeed import universal as deepspeed_universal
from tests.jobs.peers import run_peer

from .conftest import FOUR, PARALLEL, PLAIN, UNIVERSAL

SCRIPT = Path(__file__).parent / "samples" / "deepspeed_samples.py"
FROZEN = Options(settings={"frozen": "^frozen"})


@pytest.fixture(scope="session")
def samples(deepspeed_samples: Path) -> Path:
    return deepspeed_samples


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(found: Lazy, tensor: torch.Tensor, what: str) -> None:
    array = found.read()
    assert array.shape == found.shape == tuple(tensor.shape), what
    assert f"torch.{found.dtype}" == str(tensor.dtype), what
    assert array.tobytes() == raw(tensor), what


def truths(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("truth_*.pt"))]


def whole(pieces: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Slices of tensor-parallel ranks, joined by the shape of the whole, not by any pattern."""
    if tuple(pieces[0].shape) == shape:
        return pieces[0]
    (dim,) = (dim for dim, (ours, all_) in enumerate(zip(pieces[0].shape, shape, strict=True)) if ours != all_)
    return torch.cat(pieces, dim)


def expected(folder: Path) -> dict:
    """The truth of all ranks as one, by global names."""
    ranks = truths(folder)
    made: dict = {key: {} for key in ("fp32", "exp_avg", "exp_avg_sq", "frozen", "dtype", "tied")}
    made["buffers"] = ranks[0]["buffers"]  # of batch norm each rank has its own, and the first one's are saved
    for key in made:
        if key == "buffers":
            continue
        for rank, truth in enumerate(ranks):
            for name, value in truth[key].items():
                if folder.name.startswith("tp2") and key in ("fp32", "exp_avg", "exp_avg_sq"):
                    shape = truth["whole shapes"][name]
                    made[key][name] = whole([other[key][name] for other in ranks], tuple(shape))
                    continue
                prefix, experts, rest = name.partition("deepspeed_experts.")
                if experts:  # two experts each on ranks 0 and 2, and on 1 and 3
                    local, _, rest = rest.partition(".")
                    name = f"{prefix}{experts}{int(local) + 2 * (rank % 2)}.{rest}"
                made[key][name] = value
    return made


def check(content: Content, truth: dict) -> None:
    assert content.params.keys() == truth["fp32"].keys()
    for name, tensor in truth["fp32"].items():
        same(content.params[name], tensor, name)
        for state in ("exp_avg", "exp_avg_sq"):
            same(content.optimizer[state][name], truth[state][name], f"{state} of {name}")
    assert set(content.optimizer) == {"exp_avg", "exp_avg_sq"}
    for room, key in ((content.buffers, "buffers"), (content.frozen, "frozen")):
        assert room.keys() == truth[key].keys()
        for name, tensor in truth[key].items():
            same(room[name], tensor, name)
    assert content.tied == truth["tied"]
    assert content.step == 3
    assert {name for group in content.groups for name in group["params"]} == content.params.keys()
    assert content.scheduler == {"last_batch_iteration": 2}


def steps(content: Content) -> set[float]:
    assert content.scalars["step"].keys() == content.params.keys()
    return {number.value for number in content.scalars["step"].values()}


@pytest.mark.parametrize("variant", [*PLAIN, *PARALLEL, *FOUR])
def test_what_is_read_is_what_the_engines_held(variant: str, samples: Path) -> None:
    folder = samples / variant
    assert detect(folder) == "deepspeed"
    assert detect(folder / "global_step3") == "deepspeed"
    content = deepspeed.read(folder, FROZEN if variant == "z0-fp32" else Options())
    truth = expected(folder)
    check(content, truth)
    assert steps(content) == ({4.0} if variant == "z0-bf16" else {3.0})  # this optimizer takes a step when it is made
    assert {name: content.dtypes.get(name, "float32") for name in content.params} == {
        name: dtype for name, dtype in truth["dtype"].items() if name in content.params
    }
    assert content.notes.keys() == content.params.keys()
    client = content.extra["deepspeed"]["client_state"]
    assert client["epoch"] == 2
    if variant in PLAIN:
        assert client == {"epoch": 2, "note": {"seed": 5}}
        decays = [(group["weight_decay"], sorted(group["params"])) for group in content.groups]
        several = sorted(name for name, tensor in content.params.items() if len(tensor.shape) > 1)
        assert decays == [(0.1, several), (0.0, sorted(content.params.keys() - several))]
    if variant == "pp2-dp2-bf16":
        layers = {"tied_modules.embed.weight": 0, **{f"{n}.{p}": n for n in (1, 3, 4) for p in ("weight", "bias")}}
        assert content.layers == layers
        assert "checked equal" in content.notes["tied_modules.embed.weight"]
    if variant == "tp2-z1-bf16":
        assert "affine map" in content.notes["model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize("variant", UNIVERSAL)
def test_deepspeeds_own_conversion_is_read(variant: str, samples: Path) -> None:
    """In either form, with what DeepSpeed's form drops of the original: shapes, steps, buffers, frozen, ties."""
    folder = samples / variant / "global_step3_universal"
    assert detect(folder) == "deepspeed-universal"
    content = deepspeed_universal.read(folder, Options())
    check(content, expected(samples / variant))
    assert steps(content) == {3.0}
    original = deepspeed.read(samples / variant, Options())
    assert content.groups == original.groups
    if not variant.startswith("pp"):  # which leaves the layers' files behind
        assert content.dtypes == original.dtypes


def written(content: Content, out: Path, module: Format = deepspeed_universal, **settings: str) -> Path:
    out.mkdir()
    work = PieceWork(out, threads=2, budget_bytes=1 << 20)
    module.write(content, out, Options(settings=settings), work)
    work.close()
    return out


@pytest.mark.parametrize("variant", [each for each in (*PLAIN, *PARALLEL, *FOUR) if "moe" not in each])
def test_a_round_trip_gives_the_bytes_back(variant: str, samples: Path, tmp_path: Path) -> None:
    content = deepspeed.read(samples / variant, FROZEN if variant == "z0-fp32" else Options())
    out = written(content, tmp_path / "out")
    assert detect(out) == "deepspeed-universal"
    again = deepspeed_universal.read(out, Options())
    check(again, expected(samples / variant))
    for field in ("scalars", "dtypes", "groups", "scheduler"):
        assert getattr(again, field) == getattr(content, field), field
    kept, back = (each.extra["deepspeed"] for each in (content, again))
    for key in ("client_state", "ds_config", "ds_version", "optimizer"):
        assert back[key] == kept[key], key


@pytest.mark.parametrize("variant", ["z1-fp32", "z1-bf16", "z2-bf16"])
def test_partitions_are_written_as_deepspeed_cuts_them(variant: str, samples: Path, tmp_path: Path) -> None:
    """Of as many ranks: every rank's flat partitions, moments and maps are those of the original's files."""
    content = deepspeed.read(samples / variant, Options())
    out = written(content, tmp_path / "out", deepspeed, dp="2", stage=variant[1])
    for path in sorted((samples / variant / "global_step3").glob("*_optim_states.pt")):
        ours, theirs = (load(folder / "global_step3" / path.name) for folder in (out, samples / variant))
        ours, theirs = ours["optimizer_state_dict"], theirs["optimizer_state_dict"]
        for key in ("group_paddings", "partition_count", "clip_grad"):
            assert ours[key] == theirs[key], key
        for index, flat in enumerate(theirs["single_partition_of_fp32_groups"]):
            assert ours["single_partition_of_fp32_groups"][index].read().tobytes() == flat.read().tobytes()
            one, other = (each["base_optimizer_state"]["state"][index] for each in (ours, theirs))
            assert one.keys() == other.keys()
            for key, tensor in other.items():
                assert (one[key].shape, one[key].dtype) == (tensor.shape, tensor.dtype)
                end = flat.elements if tensor.shape else 1  # what pads the moments is never read
                assert one[key].read().reshape(-1)[:end].tobytes() == tensor.read().reshape(-1)[:end].tobytes(), key
            maps = [each["param_slice_mappings"][index] for each in (ours, theirs)]
            first, second = ({name: address.fields for name, address in found.items()} for found in maps)
            assert first == second
    check(deepspeed.read(out, Options()), expected(samples / variant))


@pytest.mark.parametrize(("variant", "ranks"), [("z3-bf16", 1), ("z3-fp32", 3), ("z1-bf16", 16)])
def test_plain_checkpoints_of_any_number_of_ranks(variant: str, ranks: int, samples: Path, tmp_path: Path) -> None:
    out = written(deepspeed.read(samples / variant, Options()), tmp_path / "out", deepspeed, dp=str(ranks))
    assert detect(out) == "deepspeed"
    assert len(list(out.glob("*/*_optim_states.pt"))) == ranks
    again = deepspeed.read(out, Options())
    check(again, expected(samples / variant))
    assert steps(again) == {3.0}
    for settings, message in (({"dp": "none"}, "dp=none: expected a number"), ({"stage": "3"}, "from 1 to 2")):
        with pytest.raises(ConversionError, match=message):
            deepspeed.write(again, tmp_path, Options(settings=settings), PieceWork(tmp_path, threads=1, budget_bytes=1))


RESUMES = {"resume-z1-fp32": "z1-fp32", "resume-z2-bf16": "z3-bf16"}
LOADS = {"load-z1-fp32": "z1-fp32", "load-z2-bf16": "z1-bf16", "load-z1-bf16": "z3-bf16", "load-z3-bf16": "z2-bf16"}


@pytest.fixture(scope="session")
def loads(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of one rank, with another stage, that loaded conversions of checkpoints of two ranks."""
    out = tmp_path_factory.mktemp("loads")
    for name, variant in LOADS.items():
        written(deepspeed.read(samples / variant, Options()), out / name)
    for name, variant in RESUMES.items():
        written(deepspeed.read(samples / variant, Options()), out / name, deepspeed, dp="1")
    run_peer(SCRIPT, out, "1", *LOADS, *RESUMES)
    return out


@pytest.mark.parametrize("name", [*LOADS, *RESUMES])
def test_engines_of_another_size_load_what_is_written(name: str, loads: Path, samples: Path) -> None:
    truth = expected(samples / {**LOADS, **RESUMES}[name])
    (found,) = truths(loads / name)
    assert found["fp32"].keys() == truth["fp32"].keys()
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        for parameter, tensor in truth[key].items():
            assert raw(found[key][parameter]) == raw(tensor), f"{key} of {parameter}"
    assert found["step"] == 3
    assert found["scheduler"] == {"last_batch_iteration": 2}


@pytest.fixture
def copy(samples: Path, tmp_path: Path):
    def make(variant: str) -> Path:
        return Path(shutil.copytree(samples / variant, tmp_path / variant, symlinks=True))

    return make


def refused(folder: Path, message: str, options: Options | None = None) -> None:
    def read_all() -> None:
        for _, _, tensor in deepspeed.read(folder, options or Options()).tensors():
            tensor.read()

    with pytest.raises(ConversionError, match=message) as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(copy, tmp_path: Path) -> None:
    folder = copy("z1-bf16")
    tag = folder / "global_step3"
    lost = tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = lost.read_bytes()
    lost.unlink()
    refused(folder, r"half-written: the job had 2 data-parallel .* missing: bf16_zero_pp_rank_1_mp_rank_00_optim_st")
    lost.write_bytes(data[: len(data) // 2])
    refused(folder, r"rank_1_mp_rank_00_optim_states\.pt: torn")
    lost.write_bytes(data)
    (folder / "latest").write_text("global_step9")
    refused(folder, r"latest: names the tag 'global_step9', and there is no folder")
    (folder / "latest").write_text("../../etc")
    refused(folder, r"latest: names the tag '\.\./\.\./etc'; expected the name of a folder beside it")
    (folder / "latest").unlink()
    refused(folder, r"no DeepSpeed checkpoint: neither a file 'latest', nor any \*_model_states\.pt")
    (tag / "mp_rank_00_model_states.pt").unlink()
    refused(tag, r"half-written: no \*_model_states\.pt")
    with pytest.raises(ConversionError, match="not a checkpoint of any known format"):
        detect(tmp_path)
    with pytest.raises(ConversionError, match="there is no such file or folder"):
        detect(tmp_path / "nowhere")


def test_mixed_checkpoints_are_refused(copy, samples: Path) -> None:
    folder = copy("z1-bf16")
    lost = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path = folder / "global_step3" / lost
    state = path.read_bytes()
    at = state.index(np.float32(3).tobytes())  # the step, the only three there is among float32 numbers
    path.write_bytes(state[:at] + np.float32(7).tobytes() + state[at + 4 :])
    refused(folder, r"mixed checkpoints: step of .* is 3\.0 in bf16_zero_pp_rank_0\S+ and 7\.0 in bf16_zero_pp_rank_1")
    folder = copy("pp2-dp2-bf16")
    shutil.copy(
        samples / "z0-bf16/global_step3/mp_rank_00_model_states.pt", folder / "global_step3/mp_rank_01_model_states.pt"
    )
    refused(folder, r"mixed checkpoints: mp_world_size is 2 in mp_rank_00_model_states\.pt and 1 in mp_rank_01")


def test_tensor_parallel_slices_that_differ_are_found(copy) -> None:
    folder = copy("tp2-z1-bf16")
    first = deepspeed.read(folder, Options())
    norm = first.params["model.norm.weight"].read().tobytes()
    path = folder / "global_step3/bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    data = path.read_bytes()
    at = data.index(norm)
    path.write_bytes(data[:at] + b"\x01\x02\x03\x04" + data[at + 4 :])
    refused(folder, r"model\.norm\.weight: the master weight is not the module's weight: 1 of 16 elements")
    differ = r"model\.norm\.weight: (replicated, but rank 1|ranks \[0, 1\] hold a block differently)"
    refused(folder, differ, Options(settings={"masters": "trust"}))


def test_rules_of_the_user_take_precedence(copy, tmp_path: Path) -> None:
    folder = copy("tp2-z1-bf16")
    rules = tmp_path / "mine.toml"
    rules.write_text('[[shard]]\npattern = "model.embed_tokens.weight"\nhow = "dim"\ndim = 0\n')
    content = deepspeed.read(folder, Options(rules=(rules,)))
    assert content.params["model.embed_tokens.weight"].shape == (64, 16)
    assert content.notes["model.embed_tokens.weight"].endswith(
        "mine.toml:shard 1 (model.embed_tokens.weight): cut along dimension 0"
    )
    rules.write_text(rules.read_text() + '[[shard]]\npattern = "model.{x*}"\nhow = "dim"\ndim = 0\n')
    refused(
        folder,
        r"embed_tokens\.weight is matched by mine\.toml:shard 1 .* and mine\.toml:shard 2",
        Options(rules=(rules,)),
    )


def test_without_zero_two_ways_to_name_are_refused(samples: Path) -> None:
    refused(samples / "z0-fp32", r"more than one way of naming them fits: .*; say which are frozen: --set frozen=EXPR")


def test_universal_checkpoints_that_are_torn(samples: Path, tmp_path: Path) -> None:
    out = written(deepspeed.read(samples / "z1-bf16", Options()), tmp_path / "out")
    zero = out / "global_step3_universal" / "zero"
    for path in (zero / "scale" / "fp32.pt", zero / "scale", zero / "optimizer_state.pt"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(ConversionError, match=rf"{path}: is missing"):
            deepspeed_universal.read(out, Options())
        path.parent.mkdir(exist_ok=True)
        if path.name == "scale":
            shutil.copytree(zero / "norm.bias", zero / "scale")
    shutil.rmtree(zero)
    with pytest.raises(ConversionError, match="there is no folder 'zero' in it"):
        deepspeed_universal.read(out, Options())
