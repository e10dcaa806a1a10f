"""The errors of everstep.integrations.megatron for unsupported models and groups: a JSON object of texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[3] / "docs" / "examples")]
import megatron_gpt  # noqa: E402

from everstep.elastic.contract.errors import UsageError  # noqa: E402
from everstep.integrations import megatron  # noqa: E402


def refused(action: Callable[[], Any]) -> str:
    try:
        action()
    except UsageError as error:
        return str(error)
    return ""


def changed(**settings: Any) -> str:
    """The error for a model with another configuration."""
    model = megatron_gpt.gpt(megatron_gpt.parser.parse_args(["--layers=1", "--width=16"]))
    for name, value in settings.items():
        setattr(model.config if hasattr(model.config, name) else model, name, value)
    return refused(lambda: megatron.staged(model))


def groups_of_two() -> str:
    torch.distributed.get_world_size, before = lambda: 2, torch.distributed.get_world_size
    try:
        return refused(megatron.initialize)
    finally:
        torch.distributed.get_world_size = before


if __name__ == "__main__":
    megatron.initialize()
    megatron.initialize()
    found = {name: changed(**{name: value}) for name, value in json.loads(sys.argv[1]).items()}
    found |= {"plain": refused(lambda: megatron.staged(torch.nn.Linear(2, 2))), "groups": groups_of_two()}
    print(json.dumps({**found, "as it is": changed()}))
