"""Which of torch.nn's classes fastseq stands in for: the one place that pairs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..backends.call import RnnCall
from .cells import GRUCell, LSTMCell, RNNCell, gru_cell_call, lstm_cell_call, rnn_cell_call
from .rnn import GRU, LSTM, RNN, gru_call, lstm_call, rnn_call

__all__ = ["CELLS", "DROP_INS", "LAYERS", "DropIn", "call_of"]


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
