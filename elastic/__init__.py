"""The package of the training script's interface, which is also callable as the decorator: `@everstep.elastic(...)`."""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallableModule(types.ModuleType):
    """`everstep.elastic` names both this package and the public decorator; calling the package is the decorator."""

    def __call__(self, **settings: Any) -> Any:
        from .api.decorator import elastic

        return elastic(**settings)


sys.modules[__name__].__class__ = _CallableModule
