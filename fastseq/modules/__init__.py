"""Drop-in subclasses of torch.nn's recurrent modules."""

from .cells import GRUCell, LSTMCell
from .rnn import GRU, LSTM

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell"]
