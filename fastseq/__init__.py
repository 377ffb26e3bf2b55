"""Recurrent sequence models at hardware speed: drop-in LSTM and GRU for PyTorch."""

import importlib.metadata
import warnings

from . import backends as _backends  # noqa: F401  (before the function of that name hides the package)
from . import dynamo, functional, interop, pictures
from ._version import __version__
from .accelerate import accelerate
from .dispatch import backends, use_backend
from .errors import InputError
from .explain import explain
from .freeze import freeze, unfreeze
from .generation import GenerateOutput, generate
from .modules import (
    GRU,
    LSTM,
    RNN,
    Attention,
    Bridge,
    Decoder,
    Encoder,
    GRUCell,
    LocalP,
    LSTMCell,
    RNNCell,
    Seq2Seq,
    Seq2SeqOutput,
)
from .patch import patch
from .saving import load, save
from .spec import DecoderOutput, DecoderSpec, DecoderState, Keys, Memory
from .warmup import warmup

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "Bridge",
    "Decoder",
    "DecoderOutput",
    "DecoderSpec",
    "DecoderState",
    "Encoder",
    "GRUCell",
    "GenerateOutput",
    "InputError",
    "Keys",
    "LSTMCell",
    "LocalP",
    "Memory",
    "RNNCell",
    "Seq2Seq",
    "Seq2SeqOutput",
    "__version__",
    "accelerate",
    "backends",
    "explain",
    "freeze",
    "functional",
    "generate",
    "interop",
    "load",
    "patch",
    "pictures",
    "save",
    "unfreeze",
    "use_backend",
    "warmup",
]

dynamo.install()
if any(importlib.metadata.distributions(name="fastseq")):
    warnings.warn(
        "the distribution `fastseq` is installed, another and abandoned package whose files may lie among those of "
        "`fastseq-rnn`; run: pip uninstall fastseq && pip install --force-reinstall fastseq-rnn",
        stacklevel=2,
    )
