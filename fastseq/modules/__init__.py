"""Drop-in subclasses of torch.nn's recurrent modules, and the parts of sequence-to-sequence models."""

from .attention import Attention, LocalP
from .bridge import Bridge
from .cells import GRUCell, LSTMCell
from .decoder import Decoder
from .encoder import Encoder
from .rnn import GRU, LSTM
from .seq2seq import Seq2Seq, Seq2SeqOutput

__all__ = [
    "GRU",
    "LSTM",
    "Attention",
    "Bridge",
    "Decoder",
    "Encoder",
    "GRUCell",
    "LSTMCell",
    "LocalP",
    "Seq2Seq",
    "Seq2SeqOutput",
]
