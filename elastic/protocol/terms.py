"""What the ranks of a generation agreed on in one step, as a value: what the next version is made by, on every rank.

As text it is the `agreement` in reports, plans, the coordinator's store and the manifests of checkpoints, all of which
pass it on unread. It is one JSON object; see `codec.encode_record`. Fields with a default may be missing, since earlier
versions wrote manifests without them; any other difference is refused by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .codec import Unreadable, decode_record, encode_record


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What was agreed in `step`. Fields of type Any hold JSON values.

    `tokens`: what the gradients in keepers are divided by, None if they are means or sums already. `scale`: what these
    are multiplied with then, None if they are not clipped to a norm. `idle`: the parameters, by
    number, that no micro-batch had a gradient of. `layers`: the gradient's squared norm by layer, where neighbours may
    have to stand in. `protected` is the newest version that outlives the loss of nodes, -1 if none, and `every` the
    number of steps between such versions.
    """

    step: int
    generation: int = 0  # in which it was agreed; 0 where an earlier version did not say
    loss: float | None
    norm: float | None
    scale: float | None
    skip: bool = False
    tokens: int | None = None
    groups: Any  # the settings of the optimizer's parameter groups
    frozen: tuple[str, ...] = ()
    clip: Mapping[str, Any] = field(default_factory=dict)  # "norm" and "value" -> the limit, or None
    idle: tuple[int, ...] = ()
    registered: Mapping[str, Any]  # name -> the registered object's state
    layers: Mapping[str, Any] = field(default_factory=dict)
    digest: str
    protected: int
    every: int
    save: str = ""  # the checkpoint that is made of the next version, if one is
    saved: int = -1  # the newest version that is in a checkpoint
    ancestors: tuple[tuple[str, float], ...] = ()  # the runs before this one
    after: Mapping[str, Any] | None = None  # how the user's code has left things after the step
    shown: bool = True  # with `after`: the script's functions for the step have run, too
    script: Any = None  # in a checkpoint: the settings that the script began with
    end: str = ""  # why a script asked for training to end after this step
    advance: int | None = None  # after a checkpoint: how often schedulers step, if not once

    @classmethod
    def of(cls, text: str) -> Terms:
        """What `text` says. It is shared: nothing in it may be changed. Raises Unreadable."""
        return _read(text)

    def to_text(self) -> str:
        """The same bytes for equal terms."""
        return json.dumps(encode_record(self), sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What a script may set: of the optimizer, what is frozen, and what gradients are clipped to."""
        return {"groups": self.groups, "frozen": list(self.frozen), "clip": dict(self.clip)}


@functools.lru_cache(maxsize=4)  # a step reads its own several times
def _read(text: str) -> Terms:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"what was agreed is not JSON: {error}: {text[:80]!r}") from None
    if not isinstance(raw, dict):
        raise Unreadable(f"what was agreed is no JSON object: {text[:80]!r}")
    terms: Terms = decode_record(Terms, raw, defaults=True)
    return terms
