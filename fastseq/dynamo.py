"""torch.compile through the modules: Dynamo breaks the graph at every torch.nn.LSTM and GRU, subclasses included.

Its switch for that, `torch._dynamo.config.allow_rnn`, is for the whole process and has stock modules unrolled step by
step; here it holds only while Dynamo wraps a module that runs on fastseq. Dynamo takes over a second to import, so this
waits until somebody else does.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import nn

from .modules.dropin import LAYERS
from .patch import patched

__all__ = ["install"]

_BUILDER = "torch._dynamo.variables.builder"


def install() -> None:
    """Let Dynamo trace fastseq's modules, now or as soon as it is imported."""
    if _BUILDER in sys.modules:
        _open(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _Watch())


def _open(builder: ModuleType) -> None:
    wrap, ours = builder.VariableBuilder.wrap_module, tuple(pair.fast for pair in LAYERS.values())

    def wrap_module(self: Any, value: nn.Module) -> Any:
        if isinstance(value, ours) or (patched() and isinstance(value, tuple(LAYERS))):
            with builder.config.patch(allow_rnn=True):
                return wrap(self, value)
        return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


class _Watch(MetaPathFinder):
    """Calls `_open` behind the first import of Dynamo's builder."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _open(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
