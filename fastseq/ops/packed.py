"""Weights packed once for many calls, with what shows that they are still those of the layer.

The native module packs into an opaque buffer, in the format of its instruction set; here is when it does so again.
"""

import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _native
from .cells import CELLS

__all__ = ["PACKED_PRODUCTS", "PackedLayer", "unwatched"]

# Multiplications per gate below which one step by itself is left to the weights as they stand.
PACKED_PRODUCTS: float = 0.0 if _native.C is None else _native.C.PACKED_PRODUCTS


class _Mark(NamedTuple):
    """A weight as it was when it was packed."""

    place: int  # in the layer's flat list
    weight: Tensor
    version: int
    address: int
    stride: tuple[int, ...]
    memory: torch.UntypedStorage  # held, so that its address is given to no other


class _Packed(NamedTuple):
    marks: tuple[_Mark, ...]
    isa: str
    buffers: tuple[Tensor, ...]  # one a direction


class PackedLayer:
    """W_ih and W_hh of every direction of one layer, packed when first asked for and whenever they have changed.

    Threads may share it: what it keeps is replaced as a whole, and a call that runs holds what it was given.
    """

    def __init__(self, directions: int) -> None:
        self._directions = directions
        self._kept: _Packed | None = None
        _watch(self)

    def is_current(self, weights: Sequence[Tensor]) -> bool:
        """Whether what is kept is `weights`, packed."""
        kept = self._kept
        return kept is not None and _is_current(kept, weights)

    def packed(self, cell: str, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One buffer a direction, for `rnn_forward`; () where nothing would show that the weights [flat] change."""
        kept = self._kept
        if kept is not None and _is_current(kept, weights):
            return kept.buffers
        self._kept = None
        if unwatched(weights) is not None:
            return ()
        per = len(weights) // self._directions
        marks = tuple([_mark(weights, d * per + k) for d in range(self._directions) for k in (0, 1)])  # then read them
        buffers = tuple([_pack(cell, *weights[d * per : d * per + 2]) for d in range(self._directions)])
        self._kept = _Packed(marks, _native.C.isa(), buffers)  # type: ignore[union-attr]
        return buffers

    def forget(self, written: Collection[int]) -> None:
        """Pack again at the next call if a weight's id is among `written`."""
        kept = self._kept
        if kept is not None and any(id(mark.weight) in written for mark in kept.marks):
            self._kept = None

    @property
    def nbytes(self) -> int:
        """Of what is kept now."""
        return 0 if self._kept is None else sum(buffer.nbytes for buffer in self._kept.buffers)


def unwatched(weights: Sequence[Tensor]) -> str | None:
    """Why a change of these weights could pass unseen, or come with every call."""
    for w in weights:
        if type(w) is not torch.nn.Parameter:
            return "a weight is no parameter but computed or passed for each call"
        if w.is_inference():
            return "a weight was made in inference mode, where nothing counts its changes; make it outside"
    return None


def _is_current(kept: _Packed, weights: Sequence[Tensor]) -> bool:
    if kept.isa != _native.C.isa():  # type: ignore[union-attr]
        return False
    for place, weight, version, address, stride, _ in kept.marks:
        w = weights[place]
        if w is not weight or w._version != version or w.data_ptr() != address or w.stride() != stride:
            return False
    return True


def _mark(weights: Sequence[Tensor], place: int) -> _Mark:
    w = weights[place]
    return _Mark(place, w, w._version, w.data_ptr(), w.stride(), w.untyped_storage())


def _pack(cell: str, w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """Bytes, aligned to a cache line as all memory from torch is."""
    assert _native.C is not None
    sizes = CELLS[cell].number, w_ih.dtype is torch.bfloat16, w_ih.shape[1], w_hh.shape[1]
    w_ih, w_hh = w_ih.contiguous(), w_hh.contiguous()
    buffer = torch.empty(_native.C.rnn_packed_bytes(*sizes), dtype=torch.uint8)
    _native.C.rnn_pack(*sizes, w_ih.data_ptr(), w_hh.data_ptr(), buffer.data_ptr(), torch.get_num_threads())
    return buffer


_watched: "weakref.WeakSet[PackedLayer]" = weakref.WeakSet()
_hook: Any = None


def _watch(layer: PackedLayer) -> None:
    """Fused optimizers (torch 2.13, on the CPU) and those that write through `.data` raise no version counter."""
    global _hook
    _watched.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_forget)


def _forget(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not _watched:  # what is compiled counts its writes
        return
    written = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_watched):
        layer.forget(written)
