"""The layers that can replace a lost layer approximately: the nearest ones of the same structure on either side.

CheckFree's recovery (Blagoev et al., 2025): a lost stage is initialised with the average of its neighbours, weighted by
their gradients' norms. It is lossy, and requires the user's consent.
"""

from __future__ import annotations

from collections.abc import Collection

from .units import ModelSpec


def stand_ins(spec: ModelSpec, lost: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Lost shard -> one or two shards that are not lost: the same rows of the same parameter of the nearest layers.

    Layers have the same structure if their parameters have the same shapes and types in the same order. Shards without
    such neighbours are left out.
    """
    gone = set(lost)
    position: dict[int, tuple[int, int]] = {}  # parameter -> (layer, its place in that layer)
    of_layer: list[list[int]] = [[] for _ in range(spec.layers)]
    for index, parameter in enumerate(spec.parameters):
        layer = parameter.layers[0]
        position[index] = (layer, len(of_layer[layer]))
        of_layer[layer].append(index)
    make = [tuple((spec.parameters[p].shape, spec.parameters[p].dtype) for p in members) for members in of_layer]
    at = {(s.parameter, s.start, s.stop): s.index for s in spec.shards}
    found: dict[int, tuple[int, ...]] = {}
    for index in sorted(gone):
        shard = spec.shards[index]
        layer, place = position[shard.parameter]
        sides = (range(layer - 1, -1, -1), range(layer + 1, spec.layers))
        chosen: list[int] = []
        for side in sides:
            for other in side:
                twin = at.get((of_layer[other][place], shard.start, shard.stop)) if make[other] == make[layer] else None
                if twin is not None and twin not in gone:
                    chosen.append(twin)
                    break
        if chosen:
            found[index] = tuple(chosen)
    return found
