"""Drop-in subclasses of torch.nn's recurrent modules, and the parts of sequence-to-sequence models."""

from .attention import Attention, LocalP
from .bridge import Bridge
from .cells import GRUCell, LSTMCell, RNNCell
from .decoder import Decoder
from .encoder import Encoder
from .rnn import GRU, LSTM, RNN
from .seq2seq import Seq2Seq, Seq2SeqOutput

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "Bridge",
    "Decoder",
    "Encoder",
    "GRUCell",
    "LSTMCell",
    "LocalP",
    "RNNCell",
    "Seq2Seq",
    "Seq2SeqOutput",
]
