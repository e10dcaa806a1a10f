"""Cutting tensors and renaming them, against dumb versions written with loops; and each against its own inverse."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.rules.affine import affine
from everstep.checkpointing.convert.rules.patterns import template
from everstep.checkpointing.convert.rules.renaming import rename
from everstep.checkpointing.convert.rules.rulefile import built_in, read_rules
from everstep.checkpointing.convert.rules.sharding import (
    Average,
    Expert,
    Flat,
    Fused,
    Replicated,
    Vocabulary,
    even,
    same_bits,
)


def lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, str(array.dtype), lambda: array, "memory")


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def read(pieces: list[Lazy]) -> list[np.ndarray]:
    arrays = [piece.read() for piece in pieces]
    for piece, array in zip(pieces, arrays, strict=True):
        assert array.shape == piece.shape
        assert array.flags["C_CONTIGUOUS"]
    return arrays


def same(one: Lazy, array: np.ndarray) -> None:
    assert read([one])[0].tolist() == array.tolist()


ranks = st.integers(1, 4)


@st.composite
def widths(draw: st.DrawFn) -> list[list[int]]:
    """For each of some sub-parameters, what each rank holds; none may hold nothing."""
    count, world = draw(st.integers(1, 3)), draw(ranks)
    return [draw(st.lists(st.integers(0, 4), min_size=world, max_size=world)) for _ in range(count)]


@given(widths(), st.integers(0, 2), st.integers(1, 3))
def test_fused_sub_parameters_of_any_widths(parts: list[list[int]], dim: int, other: int) -> None:
    shape = [other] * 3
    shape[dim] = sum(map(sum, parts))
    whole = numbered(*shape)
    pieces = []
    for rank in range(len(parts[0])):  # the dumb way: index by index
        taken, start = [], 0
        for part in parts:
            begin = start + sum(part[:rank])
            taken += list(range(begin, begin + part[rank]))
            start += sum(part)
        pieces.append(np.ascontiguousarray(np.take(whole, taken, axis=dim)))
    rule = Fused(dim, widths=tuple(map(tuple, parts)))
    for piece, expected in zip(rule.split("w", lazy(whole), len(pieces)), pieces, strict=True):
        same(piece, expected)
    same(rule.consolidate("w", [lazy(piece) for piece in pieces]), whole)
    flat = [lazy(piece.reshape(-1)) for piece in pieces]
    view = tuple(-1 if axis == (dim + 1) % 3 else size for axis, size in enumerate(shape))
    if all(piece.size for piece in pieces):
        same(Fused(dim, widths=tuple(map(tuple, parts)), view=view).consolidate("w", flat), whole)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), ranks, st.integers(0, 1))
def test_sub_parameters_that_do_not_divide(sizes: list[int], world: int, dim: int) -> None:
    whole = numbered(sum(sizes), 2) if dim == 0 else numbered(2, sum(sizes))
    rule = Fused(dim, sizes=tuple(sizes))
    pieces = rule.split("w", lazy(whole), world)
    cuts = np.split(whole, np.cumsum(sizes)[:-1], axis=dim)
    expected = [
        np.concatenate([np.array_split(cut, world, axis=dim)[r] for cut in cuts], axis=dim) for r in range(world)
    ]
    for piece, array in zip(pieces, expected, strict=True):
        same(piece, array)
    same(rule.consolidate("w", pieces), whole)


@given(st.integers(1, 4), ranks, st.integers(1, 3))
def test_equal_parts(each: int, world: int, parts: int) -> None:
    """Megatron's SwiGLU: rank r holds gate_r and up_r."""
    whole = numbered(each * world * parts, 2)
    rule = Fused(0, parts=parts)
    pieces = rule.split("w", lazy(whole), world)
    thirds = whole.reshape(parts, world, each, 2)
    for rank, piece in enumerate(pieces):
        same(piece, thirds[:, rank].reshape(-1, 2))
    same(rule.consolidate("w", pieces), whole)


@given(st.integers(1, 20), ranks, st.integers(1, 4))
def test_a_padded_vocabulary(rows: int, world: int, multiple: int) -> None:
    whole = numbered(rows, 3) + 1
    rule = Vocabulary(rows, multiple)
    pieces = rule.split("w", lazy(whole), world)
    padded = np.concatenate(read(pieces))
    assert len(padded) % (multiple * world) == 0
    assert len(padded) - rows < multiple * world
    assert padded[:rows].tolist() == whole.tolist()
    assert not padded[rows:].any()
    same(rule.consolidate("w", pieces), whole)


@given(st.integers(1, 12), ranks, st.randoms(use_true_random=False))
def test_experts_in_any_places(experts: int, world: int, random) -> None:
    order = list(range(experts))
    random.shuffle(order)
    starts = np.cumsum([0, *even(experts, world)])
    placement = tuple(tuple(order[a:b]) for a, b in pairwise(starts))
    whole = numbered(experts, 2, 2)
    rule = Expert(placement)
    pieces = rule.split("w", lazy(whole), world)
    for held, piece in zip(placement, pieces, strict=True):
        same(piece, np.array([whole[expert] for expert in held]).reshape(len(held), 2, 2))
    same(rule.consolidate("w", pieces), whole)


@given(st.lists(st.integers(1, 4), min_size=0, max_size=3), ranks)
def test_flat_runs_with_padding(shape: list[int], world: int) -> None:
    whole = numbered(*shape) if shape else np.float32(3).reshape(())
    rule = Flat(tuple(shape))
    pieces = rule.split("w", lazy(whole), world)
    assert len({piece.shape for piece in pieces}) == 1
    assert np.concatenate(read(pieces))[: whole.size].tolist() == whole.reshape(-1).tolist()
    same(rule.consolidate("w", pieces), whole)
    with pytest.raises(ConversionError, match="elements were found"):
        rule.consolidate("w", [lazy(np.zeros(0, np.float32))])


@given(ranks, st.integers(0, 3))
def test_copies_must_be_equal(world: int, bad: int) -> None:
    arrays = [numbered(2, 3) for _ in range(world)]
    same(Replicated().consolidate("w", [lazy(array) for array in arrays]), arrays[0])
    assert len(Replicated().split("w", lazy(arrays[0]), world)) == world
    if 0 < bad < world:
        arrays[bad][1, 2] = np.nan
        with pytest.raises(ConversionError, match=f"w: replicated, but rank {bad}"):
            Replicated().consolidate("w", [lazy(array) for array in arrays]).read()


@given(ranks)
def test_an_average_cuts_into_equal_copies(world: int) -> None:
    arrays = [np.full((2, 2), rank, np.float32) for rank in range(world)]
    mean = Average().consolidate("w", [lazy(array) for array in arrays])
    same(mean, np.full((2, 2), sum(range(world)) / world, np.float32))
    for piece in Average().split("w", mean, world):
        same(piece, mean.read())


@given(st.integers(1, 3), st.integers(1, 3), ranks, st.booleans())
def test_an_affine_map_of_columns_with_a_replicated_block(rows: int, each: int, world: int, tail: bool) -> None:
    """Query columns are cut, and all ranks hold the same block behind them."""
    shared = 2 if tail else 0
    columns = each * world + shared
    whole = numbered(rows, columns)
    entry = {"logical_shape": [rows, columns], "ranks": {}}
    for rank in range(world):
        width = each + shared
        blocks = [([rows, each], rank * each, 0, [rank])]
        if shared:
            blocks.append(([rows, shared], each * world, each, list(range(world))))
        entry["ranks"][rank] = {
            "shard_shape": [rows, width],
            "pieces": [
                {"shape": shape, "source": [at, [columns, 1]], "dest": [to, [width, 1]], "locations": where}
                for shape, at, to, where in blocks
            ],
        }
    rule = affine("info", entry)
    pieces = rule.split("w", lazy(whole), world)
    for rank, piece in enumerate(pieces):
        own = whole[:, rank * each : (rank + 1) * each]
        same(piece, np.concatenate([own, whole[:, each * world :]], axis=1))
    same(rule.consolidate("w", pieces), whole)
    if shared and world > 1:
        spoiled = pieces[1].read().copy()
        spoiled[0, -1] += 1
        with pytest.raises(ConversionError, match="hold a block differently"):
            rule.consolidate("w", [pieces[0], lazy(spoiled), *pieces[2:]]).read()


def test_affine_maps_that_lie_are_refused() -> None:
    piece = {"shape": [4], "source": [0, [1]], "dest": [0, [1]], "locations": [0]}
    entry = {"logical_shape": [4], "ranks": {0: {"shard_shape": [4], "pieces": [piece]}}}
    affine("info", entry)
    for change in ({"source": [1, [1]]}, {"dest": [-1, [1]]}, {"dest": [0, [2]]}, {"shape": [5]}, {"source": [0, []]}):
        bad = {"logical_shape": [4], "ranks": {0: {"shard_shape": [4], "pieces": [{**piece, **change}]}}}
        with pytest.raises(ConversionError, match="lies outside"):
            affine("info", bad)
    twice = {"logical_shape": [4], "ranks": {0: {"shard_shape": [2], "pieces": [{**piece, "shape": [2]}]}}}
    with pytest.raises(ConversionError, match="leaves 2 elements uncovered"):
        affine("info", twice).consolidate("w", [lazy(numbered(2))]).read()
    with pytest.raises(ConversionError, match="not an affine map"):
        affine("info", {"logical_shape": [4]})


@given(st.lists(st.sampled_from(["layers", "{n}", "weight", "{p}"]), min_size=1, max_size=5), st.data())
def test_templates_give_back_the_names_they_match(parts: list[str], data: st.DataObject) -> None:
    pattern = template(".".join(parts))
    values = {name: data.draw(st.text("ab1_", min_size=1, max_size=3)) for name in pattern.placeholders}
    name = pattern.fill(values)
    assert pattern.match(name) == values
    assert pattern.match(name + ".x") is None
    assert pattern.match("x" + name) is None or parts[0].startswith("{")


def interleaved(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, groups: int, dim: int) -> np.ndarray:
    rows = []
    for group in range(groups):
        for head in range(heads // groups):
            start = (group * (heads // groups) + head) * dim
            rows += list(q[start : start + dim])
        rows += list(k[group * dim : (group + 1) * dim])
        rows += list(v[group * dim : (group + 1) * dim])
    return np.array(rows)


def llama(heads: int, groups: int, dim: int, hidden: int, qwen: int | None) -> Content:
    """A Llama of one layer; a Qwen2 or a Qwen3, if asked for."""
    rng = np.random.default_rng(0)
    layer = "model.layers.7."
    shapes = {
        "model.embed_tokens.weight": (11, hidden),
        "model.norm.weight": (hidden,),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (heads * dim, hidden),
        layer + "self_attn.k_proj.weight": (groups * dim, hidden),
        layer + "self_attn.v_proj.weight": (groups * dim, hidden),
        layer + "self_attn.o_proj.weight": (hidden, heads * dim),
        layer + "mlp.gate_proj.weight": (5, hidden),
        layer + "mlp.up_proj.weight": (5, hidden),
        layer + "mlp.down_proj.weight": (hidden, 5),
    }
    if qwen == 2:
        shapes |= {
            layer + f"self_attn.{p}_proj.bias": (n * dim,) for p, n in (("q", heads), ("k", groups), ("v", groups))
        }
    if qwen == 3:
        shapes |= {layer + f"self_attn.{p}_norm.weight": (dim,) for p in "qk"}
    arrays = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    content = Content(step=3, params={name: lazy(array) for name, array in arrays.items()})
    content.optimizer = {"exp_avg": {name: lazy(array + 1) for name, array in arrays.items()}}
    content.scalars = {"step": {name: Scalar("float32", 3.0) for name in shapes}}
    content.tied = {"lm_head.weight": "model.embed_tokens.weight"}
    content.dtypes = dict.fromkeys(shapes, "bfloat16")
    content.layers = {name: 7 for name in shapes if name.startswith(layer)}
    content.groups = [{"lr": 0.1, "params": list(shapes)}]
    return content


def equal(one: Content, other: Content) -> None:
    first, second = ({(room, name): tensor for room, name, tensor in each.tensors()} for each in (one, other))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.shape == second[key].shape
        same(tensor, second[key].read())
    for field in ("step", "scalars", "tied", "dtypes", "layers"):
        assert getattr(one, field) == getattr(other, field)
    assert [sorted(group["params"]) for group in one.groups] == [sorted(group["params"]) for group in other.groups]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 2, 3]))
def test_llama_and_qwen_to_megatron_and_back(groups: int, per_group: int, dim: int, qwen: int | None) -> None:
    heads = groups * per_group
    variables = {"heads": heads, "groups": groups, "head_dim": dim}
    content = llama(heads, groups, dim, 4, qwen)
    rules = read_rules(built_in(f"qwen{qwen}" if qwen else "llama"))
    megatron = rename(rules.names, "a to b", content, variables)
    q, k, v = (content.params[f"model.layers.7.self_attn.{p}_proj.weight"].read() for p in "qkv")
    layer = "decoder.layers.7."
    same(megatron.params[layer + "self_attention.linear_qkv.weight"], interleaved(q, k, v, heads, groups, dim))
    gate, up = (content.params[f"model.layers.7.mlp.{p}_proj.weight"].read() for p in ("gate", "up"))
    same(megatron.params[layer + "mlp.linear_fc1.weight"], np.concatenate([gate, up]))
    assert megatron.tied == {"output_layer.weight": "embedding.word_embeddings.weight"}
    moment = megatron.optimizer["exp_avg"][layer + "self_attention.linear_qkv.weight"]
    same(moment, interleaved(q + 1, k + 1, v + 1, heads, groups, dim))
    assert "qkv" in megatron.notes[layer + "self_attention.linear_qkv.weight"]
    equal(rename(rules.names, "b to a", megatron, variables), content)


@given(st.integers(1, 3), st.integers(1, 3))
def test_gpt2_to_megatron_and_back(heads: int, dim: int) -> None:
    hidden = heads * dim
    variables = {"heads": heads, "groups": heads, "head_dim": dim}
    h = "transformer.h.0."
    shapes = {
        "transformer.wte.weight": (9, hidden),
        "transformer.wpe.weight": (6, hidden),
        h + "attn.c_attn.weight": (hidden, 3 * hidden),
        h + "attn.c_attn.bias": (3 * hidden,),
        h + "attn.c_proj.weight": (hidden, hidden),
        h + "mlp.c_fc.weight": (hidden, 4 * hidden),
    }
    rng = np.random.default_rng(1)
    content = Content(
        step=1, params={name: lazy(rng.random(shape, dtype=np.float32)) for name, shape in shapes.items()}
    )
    rules = read_rules(built_in("gpt2")).names
    masked = Content(step=1, params=content.params, buffers={h + "attn.bias": lazy(numbered(2, 2))})
    megatron = rename(rules, "a to b", masked, variables)
    assert not megatron.buffers
    whole = content.params[h + "attn.c_attn.weight"].read().T
    expected = interleaved(whole[:hidden], whole[hidden : 2 * hidden], whole[2 * hidden :], heads, heads, dim)
    same(megatron.params["decoder.layers.0.self_attention.linear_qkv.weight"], expected)
    equal(rename(rules, "b to a", megatron, variables), content)


def test_what_the_rules_do_not_cover_is_listed() -> None:
    rules = read_rules(built_in("llama")).names
    variables = {"heads": 1, "groups": 1, "head_dim": 2}
    content = llama(1, 1, 2, 4, 2)
    content.params["surprise"] = lazy(numbered(1))
    with pytest.raises(ConversionError, match=r"4 names without exactly one rule: .*surprise is matched by no rule"):
        rename(rules, "a to b", content, variables)
    content = llama(1, 1, 2, 4, None)
    twice = [*rules, *rules[:1]]
    with pytest.raises(ConversionError, match=r"embed_tokens\.weight is matched by llama\.toml:name 1 .* and llama"):
        rename(twice, "a to b", content, variables)
    del content.params["model.layers.7.self_attn.k_proj.weight"]
    with pytest.raises(ConversionError, match=r"takes .* together; missing: model\.layers\.7\.self_attn\.k_proj"):
        rename(rules, "a to b", content, variables)
    content = llama(1, 1, 2, 4, None)
    content.scalars["step"]["model.layers.7.self_attn.k_proj.weight"] = Scalar("float32", 4.0)
    with pytest.raises(ConversionError, match="the step differs"):
        rename(rules, "a to b", content, variables)
    with pytest.raises(ConversionError, match="needs the variable 'head_dim' of the model; known: heads, groups"):
        rename(rules, "a to b", llama(1, 1, 2, 4, None), {"heads": 1, "groups": 1})
    with pytest.raises(ConversionError, match="expected 12 rows for heads=2 groups=2 head_dim=2"):
        rename(rules, "a to b", llama(1, 1, 2, 4, None), {"heads": 2, "groups": 2, "head_dim": 2})
    dropped = llama(1, 1, 2, 4, None)
    del dropped.optimizer["exp_avg"]["model.layers.7.mlp.up_proj.weight"]
    with pytest.raises(ConversionError, match=r"mlp\.up_proj\.weight has no tensor beside the others"):
        rename(rules, "a to b", dropped, variables)


def test_types_and_uneven_joins(tmp_path: Path) -> None:
    """A type is of parameters, not of moments; the way back needs the sizes of unequal parts."""
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[name]]\na = ["q.{n}", "k.{n}"]\nb = "qk.{n}"\nhow = "concat"\nsizes = [4, 2]\ndim = 1\ndtype = "bfloat16"\n'
    )
    rules = read_rules(path).names
    content = Content(step=1, params={"q.0": lazy(numbered(2, 4)), "k.0": lazy(numbered(2, 2))})
    content.optimizer = {"exp_avg": dict(content.params)}
    joined = rename(rules, "a to b", content)
    assert joined.params["qk.0"].dtype == "bfloat16"
    assert joined.optimizer["exp_avg"]["qk.0"].dtype == "float32"
    whole = np.concatenate([numbered(2, 4), numbered(2, 2)], axis=1)
    same(joined.params["qk.0"], whole)
    back = rename(rules, "b to a", joined)
    equal(Content(step=1, params=back.params, optimizer=back.optimizer), content)


@given(st.sampled_from(["float32", "int16", "uint8", "complex128", "complex64", "float64"]), st.integers(0, 3))
def test_bits_are_compared(dtype: str, at: int) -> None:
    one = (np.arange(4) - 2).astype(dtype)
    one[at] = 0
    other = one.copy()
    assert same_bits(one, other)
    assert same_bits(one[::2], other[::2])
    if one.dtype.kind in "fc":
        other[at] = -0.0
        assert not same_bits(one, other)
        other[at] = one[at] = np.nan
        assert same_bits(one, other)
