"""Substitutes for lost layers: of the same structure, nearest, and not lost themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everstep.resharding.neighbors import stand_ins
from everstep.resharding.units import ModelSpec, ParameterSpec


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kinds = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=7))
    shapes = {"a": [(40, 1 << 14), (7,)], "b": [(7,), (40, 1 << 14)], "c": [(3, 5)]}
    parameters = [
        ParameterSpec(f"{layer}.{number}", shape, "float32", 4, (layer,))
        for layer, kind in enumerate(kinds)
        for number, shape in enumerate(shapes[kind])
    ]
    return ModelSpec(tuple(1.0 for _ in kinds), tuple(parameters))


@given(specs(), st.data())
def test_stand_ins(spec: ModelSpec, data: st.DataObject) -> None:
    lost = data.draw(st.sets(st.sampled_from(range(len(spec.shards)))))
    found = stand_ins(spec, lost)

    def name(shard: int) -> tuple[str, int, int]:
        s = spec.shards[shard]
        return spec.parameters[s.parameter].name.split(".")[1], s.start, s.stop

    def make(layer: int) -> list[tuple[int, ...]]:
        return [p.shape for p in spec.parameters if p.layers == (layer,)]

    for shard in lost:
        layer = spec.home(spec.shards[shard])
        like = {
            spec.home(spec.shards[other]): other
            for other in range(len(spec.shards))
            if other not in lost and name(other) == name(shard) and make(spec.home(spec.shards[other])) == make(layer)
        }
        below = [like[n] for n in sorted(like) if n < layer][-1:]
        above = [like[n] for n in sorted(like) if n > layer][:1]
        assert found.get(shard, ()) == (*below, *above)
    assert set(found) <= lost
