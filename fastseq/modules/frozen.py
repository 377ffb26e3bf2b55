"""What `fastseq.freeze` leaves in a module, and how its calls find it."""

from typing import Any

import torch
from torch import nn

from ..ops.packed import PackedLayer

__all__ = ["KEY", "Frozen", "frozen"]

KEY = "_fastseq_frozen"  # in a module's __dict__


class Frozen(tuple[PackedLayer, ...]):
    """One for each layer of a module. A copy or pickle of it is None: what is packed is of one module, here and now."""

    __slots__ = ()

    @classmethod
    def of(cls, layers: int, directions: int) -> "Frozen":
        return cls(PackedLayer(directions) for _ in range(layers))

    def __reduce__(self) -> Any:
        return type(None), ()


def frozen(module: nn.Module) -> Frozen | None:
    """What is kept for `module`; compiled calls are given nothing."""
    if torch.compiler.is_compiling():
        return None
    found: Frozen | None = module.__dict__.get(KEY)
    return found
