"""Layouts that DeepSpeed does not write on CPU: synthetic files (see deepspeed_synthetic), read and compared."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from everstep.checkpointing.convert.core.content import Content, ConversionError
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import PieceWork
from everstep.checkpointing.convert.files.torchfile import load
from everstep.checkpointing.convert.files.torchwriting import save
from everstep.checkpointing.convert.formats.deepspeed import format as deepspeed
from everstep.checkpointing.convert.formats.deepspeed import universal as deepspeed_universal

from .deepspeed_synthetic import STATES, Job, cut, fragment, lazy, numbered, state_of, write

HEADS = (6, 2, 2)  # rows of q, k and v: k and v cut unevenly over two ranks
WIDTHS = ((4, 2), (1, 1), (2, 0))  # per rank


def check(content: Content, wholes: dict[str, np.ndarray]) -> None:
    assert content.params.keys() == wholes.keys()
    for name, whole in wholes.items():
        for state in STATES:
            tensor = content.params[name] if state == "fp32" else content.optimizer[state][name]
            found = tensor.read()
            assert found.shape == tensor.shape == whole.shape, name
            assert found.tolist() == state_of(whole, state).tolist(), f"{state} of {name}"


def uneven(whole: np.ndarray) -> list[np.ndarray]:
    """Row by row: rank 0 takes the first of each sub-parameter, rank 1 the others."""
    starts = np.cumsum((0, *HEADS))
    rows = [[], []]
    for start, (first, second) in zip(starts, WIDTHS, strict=False):
        rows[0] += range(start, start + first)
        rows[1] += range(start + first, start + first + second)
    return [whole[rows[0]], whole[rows[1]]]


def lists(version: float, **more) -> dict:
    return {"universal_checkpoint_version": version, **more}


def test_every_list_of_patterns(tmp_path: Path) -> None:
    qkv, gate_up, vocabulary = numbered(10, 3), numbered(8, 3, start=100), numbered(12, 2, start=200)
    row, column, norm = numbered(3, 6, start=300), numbered(6, 2, start=400), numbered(5, start=500)
    slices = [numbered(4, start=600), numbered(4, start=602)]
    gate, up = gate_up[:4], gate_up[4:]
    pieces = {
        "h.0.qkv.weight": uneven(qkv),
        "h.0.gate_up.weight": [np.concatenate([gate[r * 2 : r * 2 + 2], up[r * 2 : r * 2 + 2]]) for r in (0, 1)],
        "embed.weight": cut(np.concatenate([vocabulary, np.zeros((4, 2), np.float32)]), 2, 0),
        "h.0.out.weight": cut(row, 2, 1),
        "h.0.in.weight": cut(column, 2, 0),
        "h.0.norm.weight": [norm, norm],
        "h.0.router.bias": slices,
    }
    info = lists(
        0.4,
        tp_replicated_parameter_patterns=[r".*\.norm\.weight"],
        parameter_to_average_patterns=[r".*router"],
        parameter_with_row_parallelism_patterns=[r"h\.\d+\.out\.weight"],
        parameter_with_2_sub_params_cat_dim_0=[r"h\.\d+\.gate_up\.weight"],
        parameter_with_sub_params=[{"patterns": [r".*qkv\.weight"], "shape": (HEADS, -1), "partition_dim": 0}],
        sub_param_shard_widths={r".*qkv\.weight": [list(widths) for widths in WIDTHS]},
        vocabulary_parameter_patterns=["embed"],
        original_vocab_size=12,
    )
    content = deepspeed.read(write(Job(pieces, info=info), tmp_path / "in"), Options())
    wholes = {
        "h.0.qkv.weight": qkv,
        "h.0.gate_up.weight": gate_up,
        "embed.weight": vocabulary,
        "h.0.out.weight": row,
        "h.0.in.weight": column,
        "h.0.norm.weight": norm,
        "h.0.router.bias": (slices[0] + slices[1]) / 2,
    }
    check(content, wholes)
    assert content.notes["h.0.in.weight"].endswith("(no pattern: the default): cut along dimension 0")
    assert "parameter_with_sub_params (.*qkv\\.weight)" in content.notes["h.0.qkv.weight"]

    out = tmp_path / "out"
    out.mkdir()
    deepspeed_universal.write(content, out, Options(), PieceWork(out, threads=1, budget_bytes=1 << 20))
    check(deepspeed_universal.read(out, Options()), wholes)
    told = {name: load(out / "global_step5_universal/zero" / name / "fp32.pt") for name in wholes}
    assert told["h.0.gate_up.weight"]["param_n_sub_params"] == 2
    assert told["h.0.out.weight"]["cat_dim"] == 1
    assert told["embed.weight"]["vocab_tensor"] is True
    shape = told["h.0.qkv.weight"]["sub_param_shape"].fields
    assert (shape["shape"], shape["partition_dim"]) == ((HEADS, -1), 0)


def test_sub_parameters_before_version_four(tmp_path: Path) -> None:
    """A number was their count, a tuple their widths, and both were cut evenly."""
    whole = numbered(12, 2)
    thirds = whole.reshape(3, 2, 2, 2)
    pieces = {"a.qkv": [thirds[:, rank].reshape(-1, 2) for rank in (0, 1)]}
    for number, shape in enumerate([(3, -1), ((4, 4, 4), -1), ((4, 4, 4), 2)]):
        info = lists(0.2, parameter_with_sub_params=[{"patterns": ["a.qkv"], "shape": shape, "partition_dim": 0}])
        content = deepspeed.read(write(Job(pieces, info=info), tmp_path / str(number)), Options())
        check(content, {"a.qkv": whole})
    info = lists(0.2, parameter_with_sub_params=[{"patterns": ["a"], "shape": ((5, 4, 3), -1), "partition_dim": 0}])
    with pytest.raises(ConversionError, match=r"sub-parameters of \(5, 4, 3\) do not divide by 2 ranks"):
        deepspeed.read(write(Job(pieces, info=info), tmp_path / "uneven"), Options())


def test_affine_map_of_a_replicated_block(tmp_path: Path) -> None:
    """Query columns are cut over the ranks, and both hold the same keys behind them."""
    whole = numbered(2, 6)
    pieces = [np.concatenate([whole[:, r * 2 : r * 2 + 2], whole[:, 4:]], axis=1) for r in (0, 1)]
    entry: dict = {"logical_shape": [2, 6], "ranks": {}}
    for rank in (0, 1):
        blocks = [(rank * 2, 0, [rank]), (4, 2, [0, 1])]
        entry["ranks"][rank] = {
            "shard_shape": [2, 4],
            "pieces": [
                {"shape": [2, 2], "source": [at, [6, 1]], "dest": [to, [4, 1]], "locations": where}
                for at, to, where in blocks
            ],
        }
    info = lists(0.4, affine_map={"version": 1, "params": {"^q$": entry}}, tp_replicated_parameter_patterns=["q"])
    content = deepspeed.read(write(Job({"q": pieces}, info=info), tmp_path / "in"), Options())
    check(content, {"q": whole})
    for block in entry["ranks"].values():
        block["pieces"][0]["scale"] = 0.5
    with pytest.raises(ConversionError, match=r"its affine map scales it, and exp_avg.* cannot be scaled along"):
        deepspeed.read(write(Job({"q": pieces}, info=info), tmp_path / "scaled"), Options())
    info["affine_map"]["version"] = 2
    with pytest.raises(ConversionError, match="affine map of version 2; expected 1"):
        deepspeed.read(write(Job({"q": pieces}, info=info), tmp_path / "newer"), Options())


def test_half_precision_and_the_elastic_form(tmp_path: Path) -> None:
    wholes = {"a": numbered(3, 5), "b": numbered(7, start=50)}
    pieces = {name: [whole] for name, whole in wholes.items()}
    half = Job(pieces, data=3, prefix="", dtype="float16")
    content = deepspeed.read(write(half, tmp_path / "half"), Options())
    check(content, wholes)
    assert content.dtypes == {"a": "float16", "b": "float16"}
    scaler = content.extra["deepspeed"]["optimizer"]["loss_scaler"]
    assert scaler == {"class": "DynamicLossScaler", "fields": {"cur_scale": 65536.0, "dynamic": True}}
    content = deepspeed.read(write(Job(pieces, elastic=True), tmp_path / "elastic"), Options())
    check(content, wholes)
    assert {number.value for number in content.scalars["step"].values()} == {5}


def test_refusals_of_patterns(tmp_path: Path) -> None:
    pieces = {"a.weight": cut(numbered(4, 2), 2, 0)}
    with pytest.raises(ConversionError, match=r"neither universal_checkpoint_info nor a rule file .* give --rules"):
        deepspeed.read(write(Job(pieces), tmp_path / "none"), Options())
    info = lists(0.2, tp_replicated_parameter_patterns=["a"], parameter_with_row_parallelism_patterns=["a.w"])
    with pytest.raises(ConversionError, match=r"a\.weight is matched by \S+replicated\S+ \(a\) and \S+row_par"):
        deepspeed.read(write(Job(pieces, info=info), tmp_path / "two"), Options())
    info = lists(0.4, autotp_unsupported_parameter_patterns={"a": "fused in an unknown way"})
    with pytest.raises(ConversionError, match=r"marks a\.weight as not convertible: .*a: fused in an unknown way"):
        deepspeed.read(write(Job(pieces, info=info), tmp_path / "unsupported"), Options())
    info = lists(0.4, parameter_with_sub_params=[{"patterns": ["a"], "shape": ((2, 2), -1), "partition_dim": 0}])
    with pytest.raises(ConversionError, match="has no sub_param_shard_widths for 'a'"):
        deepspeed.read(write(Job(pieces, info=info), tmp_path / "widths"), Options())


def test_experts_where_data_ranks_come_first(tmp_path: Path) -> None:
    """Four ranks, two experts of which each is on one half of them: with this order ranks 0 and 1 have the first."""
    whole = [numbered(2, 3), numbered(2, 3, start=50)]
    name = "moe.deepspeed_moe.experts.deepspeed_experts.0.weight"
    root = write(Job({name: [whole[0]]}, data=4, config={"use_data_before_expert_parallelism": True}), tmp_path / "in")
    for rank in range(4):
        path = root / "global_step5" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        flat = {state: state_of(whole[rank // 2], state).reshape(-1) for state in STATES}
        mine = {state: lazy(array[rank % 2 * 3 : rank % 2 * 3 + 3]) for state, array in flat.items()}
        group = {"lr": 0.5, "name": "ep_size_2", "moe": True, "params": [0]}
        moments = {"exp_avg": mine["exp_avg"], "exp_avg_sq": mine["exp_avg_sq"], "step": lazy(np.array(5.0))}
        state = {
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [group]},
            "single_partition_of_fp32_groups": [mine["fp32"]],
            "param_slice_mappings": [{name: fragment(0, 3)}],
        }
        save(path, {"optimizer_state_dict": state, "ds_version": "0.19.8"})
    content = deepspeed.read(root, Options())
    check(content, {name.replace("experts.0.", f"experts.{number}."): whole[number] for number in (0, 1)})


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)


def test_a_checkpoint_that_would_run_code(tmp_path: Path) -> None:
    root = write(Job({"a": [numbered(4)]}), tmp_path / "in")
    path = root / "global_step5" / "mp_rank_00_model_states.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"module": Evil(tmp_path / "canary")}))
    with pytest.raises(ConversionError, match=r"mp_rank_00_model_states\.pt: refused: its pickle asks for \w+\.system"):
        deepspeed.read(root, Options())
    assert not (tmp_path / "canary").exists()


def test_a_mapping_that_points_outside(tmp_path: Path) -> None:
    root = write(Job({"a": [numbered(4)]}, data=1), tmp_path / "in")
    path = root / "global_step5" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    for start, count in ((2, 4), (-1, 4), (0, 3)):
        moments = {state: lazy(numbered(4)) for state in ("exp_avg", "exp_avg_sq")}
        state = {
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
            "single_partition_of_fp32_groups": [lazy(numbered(4))],
            "param_slice_mappings": [{"a": fragment(start, count)}],
        }
        save(path, {"optimizer_state_dict": state, "ds_version": "0.19.8"})
        with pytest.raises(ConversionError, match=r"elements (-1|2) to|3 elements of fp32 of a were found; expected 4"):
            deepspeed.read(root, Options())
