"""The decoders of papers and toolkits, as options of `Decoder`. Every option may be overridden by name."""

from functools import partial
from typing import Any, TypeVar

from torch import nn

from ..errors import InputError
from ..spec import one_of
from .attention import Attention
from .bridge import Bridge

__all__ = ["Presets"]

Made = TypeVar("Made", bound="Presets")

INPUT_FEEDING: dict[str, Any] = {"attend": "after", "feed": "output", "readout": ("context", "state")}


class Presets(nn.Module):
    """Class methods that make a Decoder; `options` are the arguments of `Decoder`, and go before the preset's.

    Those with a context need memory_size, the features of `Memory.out`.
    """

    @classmethod
    def sutskever(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """Sutskever et al. 2014: an LSTM whose first state is the encoder's last; no attention, no context."""
        preset: dict[str, Any] = {"readout": ("state",), "combine": None}
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def cho(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """Cho et al. 2014, A.1: c = tanh(V h), h'_0 = tanh(V' c), r * (U h + C c), maxout of state, input and context.

        The reset gate multiplies after the product: cell="gru".
        """
        preset: dict[str, Any] = {
            "cell": "gru", "summary_size": hidden_size, "context_to": "first", "context_side": "hidden",
            "readout": ("state", "input", "context"), "combine": "maxout", "bridge": Bridge("top", act="tanh"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def bahdanau(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """Bahdanau et al. 2014, A.2.2: attend with s_{t-1}, then the cell, then maxout of s_{t-1}, input and context.

        Of a bidirectional encoder; for another: bridge=Bridge("top", act="tanh").
        """
        preset: dict[str, Any] = {
            "cell": "gru_reset_before", "attention": "additive", "context_to": "first", "combine": "maxout",
            "readout": ("prev_state", "input", "context"), "bridge": Bridge("backward", act="tanh"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def luong(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """Luong et al. 2015: the cell, then the general score, then tanh(W [c; s]), which joins the next input."""
        preset = INPUT_FEEDING | {"attention": "general", "combine": "tanh"}
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def opennmt(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """OpenNMT-py with input feeding: `luong`, but attention="additive", its "mlp", has a readout without tanh.

        attention: "general", "dot" or "additive".
        """
        attention = options.pop("attention", "general")
        one_of("attention", attention, ("general", "dot", "additive"))
        preset = INPUT_FEEDING | {"attention": attention, "combine": "tanh"}
        if attention == "additive":
            preset |= {"attention": partial(Attention, query_bias=True), "combine": "linear", "combine_bias": True}
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def fairseq(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """fairseq's LSTM: `luong`; an encoder of another size is mapped by one linear layer for h and one for c."""
        memory_size = options.get("memory_size") or getattr(options.get("attention"), "memory_size", hidden_size)
        bridge = Bridge(map="copy" if memory_size == hidden_size else "shared")
        preset = INPUT_FEEDING | {"attention": "general", "combine": "tanh", "bridge": bridge}
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def joeynmt(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """JoeyNMT: `luong` with the additive score, tanh(W [s; c] + b), and one first state for all layers.

        Its "last" instead of "bridge": bridge=Bridge("top_forward", cell="same").
        """
        preset = INPUT_FEEDING | {
            "attention": "additive", "readout": ("state", "context"), "combine": "tanh", "combine_bias": True,
            "bridge": Bridge("top", map="shared", act="tanh", cell="same"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def tf_nmt(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """tensorflow/nmt's "scaled_luong": W [s; c], linear, is fed; the general score has a learned scale.

        Its "normed_bahdanau": attention=partial(Attention, query_bias=True, normalize=True).
        """
        preset = INPUT_FEEDING | {
            "attention": partial(Attention, score="general", scale="learned"), "readout": ("state", "context"),
            "combine": "linear",
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def gnmt(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 4, **options: Any) -> Made:
        """Wu et al. 2016, as tensorflow/nmt's gnmt_v2: the lowest layer asks, the upper ones read the context.

        Residuals from the third layer on; the lowest layer starts from the encoder's backward direction.
        """
        if num_layers < 2:
            raise InputError(f"num_layers={num_layers}; GNMT's upper layers read the context: at least 2")
        preset: dict[str, Any] = {
            "attention": partial(Attention, query_bias=True, normalize=True), "attend": "after", "query_layer": 0,
            "feed": "context", "context_to": "upper", "readout": ("state",), "combine": None,
            "residual": 2 if num_layers > 2 else None, "bridge": Bridge("backward"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def conditional_gru(
        cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any
    ) -> Made:
        """Nematus and Marian (Firat and Cho 2016): cell, attention, cell; tanh(W [input; s; c] + b)."""
        preset: dict[str, Any] = {
            "cell": "gru", "attention": partial(Attention, query_bias=True), "attend": "between",
            "readout": ("input", "state", "context"), "combine": "tanh", "combine_bias": True,
            "bridge": Bridge("mean", act="tanh"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))

    @classmethod
    def bentrevett(cls: type[Made], input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> Made:
        """bentrevett/pytorch-seq2seq with attention: concat with a bias; state, context and input side by side."""
        preset: dict[str, Any] = {
            "cell": "gru", "attention": partial(Attention, score="concat", query_bias=True), "context_to": "first",
            "readout": ("state", "context", "input"), "combine": None, "bridge": Bridge("top", act="tanh"),
        }  # fmt: skip
        return cls(input_size, hidden_size, num_layers, **(preset | options))
