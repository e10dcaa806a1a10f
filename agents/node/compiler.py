"""Torch's compiler, imported when something needs it: importing `torch._dynamo` takes as long as importing torch.

Every optimizer of torch imports it on its first use, for two functions only: `graph_break()`, which does nothing
outside of compiled code, and, through `torch._compile`, `disable(f)`, which then only calls f. A stand-in in
`sys.modules` implements these two. Access to any other attribute, and the import of a submodule, imports the real
module first, by the ordinary machinery, so that code that compiles sees no difference.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
_DECORATORS = "torch._compile"  # keeps what `disable(f)` returned in f.__dynamo_disable
_lock = threading.Lock()
_disabled: list[Callable[..., Any]] = []  # functions that the stand-in's `disable` returned unchanged


def defer_compiler() -> None:
    """Install the stand-in as `torch._dynamo`, unless the real module is imported already."""
    import torch

    if NAME in sys.modules:
        return
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    sys.modules[NAME] = stand_in = _StandIn(NAME)
    vars(stand_in).update(__spec__=spec, __file__=spec.origin, __path__=spec.submodule_search_locations)
    sys.meta_path.insert(0, _Parts())
    torch._dynamo = stand_in


def load_compiler() -> None:
    """Import the real module now."""
    _real()


def _real() -> ModuleType:
    """The real module; imports it in place of the stand-in."""
    with _lock:
        if isinstance(sys.modules.get(NAME), _StandIn):
            del sys.modules[NAME]
    module = importlib.import_module(NAME)
    while _disabled:
        vars(_disabled.pop()).pop("__dynamo_disable", None)  # so that torch's decorator asks the real module
    return module


class _StandIn(ModuleType):
    """`torch._dynamo` before it is needed."""

    def graph_break(self, *args: Any, **options: Any) -> None:
        """Nothing is compiled, so there is no graph to break."""
        if sys.modules.get(NAME) is not self:  # the caller holds a reference to the stand-in
            _real().graph_break(*args, **options)

    def disable(self, *args: Any, **options: Any) -> Any:
        """The function itself, for torch's own decorators."""
        decorates = sys._getframe(1).f_globals.get("__name__") == _DECORATORS
        if not decorates or sys.modules.get(NAME) is not self:
            return _real().disable(*args, **options)
        _disabled.append(args[0])
        return args[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # code that inspects all modules must not import this one
        return getattr(_real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_real(), name, value)


class _Parts(MetaPathFinder, Loader):
    """Imports the real module before one of its submodules, whose import has seen only the stand-in."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The specification of a submodule that is imported already: the real module imports most of them."""
        if not name.startswith(f"{NAME}.") or not isinstance(sys.modules.get(NAME), _StandIn):
            return None
        _real()
        part = importlib.import_module(name)
        del sys.modules[name]  # else it would be executed again; other importing threads wait
        return ModuleSpec(name, self, loader_state=(part, part.__spec__))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The submodule, unchanged."""
        part: ModuleType = spec.loader_state[0]
        return part

    def exec_module(self, module: ModuleType) -> None:
        """Restore the submodule's own specification, which importlib has replaced by ours."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state[1]
