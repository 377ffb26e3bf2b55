"""A CUDA graph on the CPU: the operators of one step, done again on the same tensors whatever Python says by then."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Recording", "replays"]

_WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "item", "equal")  # for the GPU, or for the host's memory


class Recording(TorchDispatchMode):
    """Each operator with its very tensors. AssertionError where a GPU would wait for the host, or the host for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _WAITS, f"{name} within a step"
        masks = [t for t in pytree.tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dtype == torch.bool]
        assert name not in ("index", "index_put_") or not masks, f"{name} by a mask within a step"
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _tensors(found)))
        return found

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            there = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for old, new in zip(before, _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in there:  # else a view, or written in place
                    old.copy_(new)


def replays(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """In the place of `chunked_search._repeated`."""
    recording = Recording()

    def repeat() -> None:
        if recording.calls:
            recording.replay()
            return
        with recording:
            step()

    return repeat


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
