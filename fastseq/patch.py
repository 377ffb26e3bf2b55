"""Give torch.nn's own recurrent classes fastseq's forward, for as long as wanted."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .engine import run, run_cell
from .modules.cells import gru_cell_call, lstm_cell_call
from .modules.rnn import gru_call, lstm_call

__all__ = ["Patch", "patch", "patched"]


def _lstm(self: nn.LSTM, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
    return run(lstm_call(self, input, hx), "auto")


def _gru(self: nn.GRU, input: Any, hx: Tensor | None = None) -> Any:
    out, (h,) = run(gru_call(self, input, hx), "auto")
    return out, h


def _lstm_cell(self: nn.LSTMCell, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Any:
    return run_cell(lstm_cell_call(self, input, hx), "auto")


def _gru_cell(self: nn.GRUCell, input: Tensor, hx: Tensor | None = None) -> Any:
    return run_cell(gru_cell_call(self, input, hx), "auto")[0]


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.LSTM: _lstm,
    nn.GRU: _gru,
    nn.LSTMCell: _lstm_cell,
    nn.GRUCell: _gru_cell,
}
_originals: dict[type[nn.Module], Callable[..., Any]] = {}  # not empty while any patch is in force
_patches = 0
_lock = threading.Lock()


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
    """From now on torch.nn.LSTM, GRU, LSTMCell and GRUCell run on fastseq, in the whole process.

    The classes stay the same objects and only their `forward` changes: instances made before, subclasses that do not
    override forward, pickles, and modules that did `from torch.nn import LSTM` earlier are all served.

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
            for cls, forward in _FORWARDS.items():
                _originals[cls] = cls.forward
                cls.forward = forward
        elif _patches == 0:
            for cls, original in _originals.items():
                cls.forward = original
            _originals.clear()
