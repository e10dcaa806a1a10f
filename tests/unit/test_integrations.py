"""Integrations with frameworks that are not installed beside the project."""

from __future__ import annotations

import sys

import pytest

from everstep.elastic.contract.errors import UsageError
from everstep.integrations import megatron


def test_megatron_core_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(UsageError, match=r"cannot be imported .*: pip install 'everstep\[megatron\]'"):
        megatron.initialize()
