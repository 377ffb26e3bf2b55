"""Give torch.nn's own recurrent classes fastseq's forward, for as long as wanted."""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .engine import run, run_cell
from .modules.dropin import CELLS, LAYERS, DropIn

__all__ = ["Patch", "patch", "patched"]


def _layer_forward(pair: DropIn) -> Callable[..., Any]:
    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        out, state = run(pair.call(self, input, hx), "auto")
        return out, state if pair.states else state[0]

    return forward


def _cell_forward(pair: DropIn) -> Callable[..., Any]:
    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        state = run_cell(pair.call(self, input, hx), "auto")
        return state if pair.states else state[0]

    return forward


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    **{stock: _layer_forward(pair) for stock, pair in LAYERS.items()},
    **{stock: _cell_forward(pair) for stock, pair in CELLS.items()},
}
_originals: dict[type[nn.Module], Callable[..., Any]] = {}  # not empty while any patch is in force
_patches = 0
_lock = threading.RLock()
_torch_script = torch.jit.script


@functools.wraps(_torch_script)
def _script(obj: Any, *args: Any, **options: Any) -> Any:
    """torch.jit.script while a patch is in force: with torch's own forwards, whose source it can compile."""
    options["_frames_up"] = options.get("_frames_up", 0) + 1  # it looks names up in its caller
    with _lock:
        _restore()
        try:
            return _torch_script(obj, *args, **options)
        finally:
            _replace()


class Patch:
    """One patch in force: `with` it, or call `undo`. torch's forwards return when the last one ends."""

    def __init__(self) -> None:
        self._done = False
        _count(1)

    def undo(self) -> None:
        """End this patch; a second time does nothing."""
        if not self._done:
            self._done = True
            _count(-1)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch() -> Patch:
    """From now on torch.nn.LSTM, GRU, RNN and their cells run on fastseq, in the whole process.

    The classes stay the same objects and only their `forward` changes: instances made before, subclasses that do not
    override forward, pickles, and modules that did `from torch.nn import LSTM` earlier are all served. While
    torch.jit.script compiles, which takes torch's own forward, that is put back.

    >>> with fastseq.patch():
    ...     third_party_training()
    """
    return Patch()


def patched() -> bool:
    """Whether any patch is in force."""
    return bool(_originals)


def _count(change: int) -> None:
    global _patches
    with _lock:
        _patches += change
        if _patches == 1 and change == 1:
            _replace()
        elif _patches == 0:
            _restore()
            _originals.clear()


def _replace() -> None:
    for cls, forward in _FORWARDS.items():
        _originals[cls] = cls.forward
        cls.forward = forward
    torch.jit.script = _script


def _restore() -> None:
    torch.jit.script = _torch_script
    for cls, original in _originals.items():
        cls.forward = original
