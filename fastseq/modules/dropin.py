"""Which of torch.nn's classes fastseq stands in for: the one place that pairs them."""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

from ..backends.call import RnnCall
from .cells import GRUCell, LSTMCell, RNNCell, gru_cell_call, lstm_cell_call, rnn_cell_call
from .rnn import GRU, LSTM, RNN, gru_call, lstm_call, rnn_call

__all__ = ["CELLS", "DROP_INS", "LAYERS", "DropIn", "call_of", "not_reached", "own_forward"]


class DropIn(NamedTuple):
    fast: type[nn.Module]
    call: Callable[[Any, Any, Any], RnnCall]  # of (module, input, hx), where module is torch's or ours
    states: bool  # answers with a tuple of states, (h, c)


LAYERS: dict[type[nn.Module], DropIn] = {
    nn.LSTM: DropIn(LSTM, lstm_call, True),
    nn.GRU: DropIn(GRU, gru_call, False),
    nn.RNN: DropIn(RNN, rnn_call, False),
}
CELLS: dict[type[nn.Module], DropIn] = {
    nn.LSTMCell: DropIn(LSTMCell, lstm_cell_call, True),
    nn.GRUCell: DropIn(GRUCell, gru_cell_call, False),
    nn.RNNCell: DropIn(RNNCell, rnn_cell_call, False),
}
DROP_INS = LAYERS | CELLS


def call_of(module: nn.Module, input: Any, hx: Any) -> RnnCall:
    """The call that `module`, an instance of one of DROP_INS, makes of (input, hx)."""
    return next(pair.call for stock, pair in DROP_INS.items() if isinstance(module, stock))(module, input, hx)


def own_forward(module: nn.Module) -> tuple[str, bool] | None:
    """The class whose forward goes before that of torch's class or ours, and whether it comes to super().forward();
    None: there is none, but the instance may have one.
    """
    own = None
    for cls in type(module).__mro__:
        if cls in _KNOWN:
            break
        if "forward" in vars(cls):
            own = own or f"{cls.__module__}.{cls.__qualname__}"
            if not _calls_super(vars(cls)["forward"], cls):
                return own, False
    return None if own is None else (own, True)


def not_reached(module: nn.Module) -> str | None:
    """Why calls of an instance of one of DROP_INS come to none of our kernels, as far as can be seen; None: they do."""
    if "forward" in vars(module) and not isinstance(module, tuple(pair.fast for pair in DROP_INS.values())):
        return "forward is set on the instance, where accelerate and patch leave it"
    own = own_forward(module)
    if own is None or own[1]:
        return None
    return f"{own[0]} has a forward of its own, which calls no super().forward()"


_KNOWN = {*DROP_INS, *(pair.fast for pair in DROP_INS.values())}


def _calls_super(forward: Any, cls: type) -> bool:
    """Whether the code of `forward`, which `cls` defines, names super().forward or a base's."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    names = set() if code is None else set(_names(code))
    return "forward" in names and not names.isdisjoint({"super", *(base.__name__ for base in cls.__mro__[1:])})


def _names(code: CodeType) -> Iterator[str]:
    """Of what the code looks up, functions within it included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
