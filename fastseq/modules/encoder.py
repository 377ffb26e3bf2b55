"""fastseq.Encoder: recurrent layers over padded rows of any lengths, whose result a decoder reads."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..backends.call import RnnCall
from ..checks import checked_lengths, need_tensor
from ..config import described, part
from ..engine import run, set_lengths
from ..errors import InputError
from ..functional import Lengths
from ..spec import CELLS, LayerState, Memory, one_of, prefix_mask
from .dropin import call_of
from .modes import not_scriptable
from .rnn import GRU, LSTM, RNN, gru_call

__all__ = ["Encoder"]


@part
class Encoder(nn.Module):
    """LSTM, GRU or plain recurrent layers, batch first: forward(x, lengths) -> Memory.

    bidirectional: all layers, or an int, so many from the bottom (1: GNMT). residual: from the second layer on, a
    layer's input is added to its output where both have one size (Wu et al. 2016, eq. 6). dropout: on the input of
    every layer but the first. zoneout, recurrent_dropout, recurrent_dropout_on, layer_norm, learn_state: of each
    layer, as for `LSTM`. embedding: a module that makes x [B, S, input_size] of token ids, or whatever is given.
    cell, backend: as for `Decoder` and `LSTM`; "gru_reset_before" is the encoder of Cho et al. 2014 and Bahdanau et al.
    2014. `output_size`: features D of the memory.

    Parameters: layers.0.weight_ih_l0, ... as of one-layer fastseq.LSTM and GRU; embedding.*.
    """

    __prepare_scriptable__ = not_scriptable
    embedding: nn.Module | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,  # of each direction
        num_layers: int = 1,
        *,
        cell: str = "lstm",
        bidirectional: bool | int = False,
        dropout: float = 0.0,
        residual: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_on: str = "state",
        layer_norm: bool = False,
        learn_state: bool = False,
        embedding: nn.Module | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("cell", cell, CELLS)
        if num_layers < 1:
            raise InputError(f"num_layers={num_layers}; an encoder has at least one")
        both = num_layers * bidirectional if isinstance(bidirectional, bool) else bidirectional
        if not 0 <= both <= num_layers:
            raise InputError(f"bidirectional={both} of {num_layers} layer(s); use 0 to num_layers, or True for all")
        if not 0 <= dropout <= 1:
            raise InputError(f"dropout={dropout}; it is a probability, 0 to 1")
        if layer_norm and cell == "gru_reset_before":
            raise InputError(
                "layer_norm=True with cell='gru_reset_before', whose recurrent product comes in two; use cell='gru'"
            )
        if embedding is not None and not isinstance(embedding, nn.Module):
            raise TypeError(f"embedding must be a torch.nn.Module, got {type(embedding).__name__}; use nn.Embedding")
        if type(embedding) is nn.Embedding and embedding.embedding_dim != input_size:
            raise InputError(
                f"embedding makes {embedding.embedding_dim} features of a token, but input_size={input_size}; make them"
                " one"
            )
        self.input_size, self.hidden_size, self.num_layers, self.cell = input_size, hidden_size, num_layers, cell
        self.bidirectional, self.dropout, self.residual = both, dropout, residual
        zoneout = (*zoneout,) if isinstance(zoneout, list) else zoneout  # as a file has it
        self.zoneout, self.layer_norm, self.learn_state = zoneout, layer_norm, learn_state
        self.recurrent_dropout, self.recurrent_dropout_on = recurrent_dropout, recurrent_dropout_on
        self.register_module("embedding", embedding)
        kinds: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "gru_reset_before": ResetBefore}
        kind = kinds[cell] if cell in kinds else partial(RNN, nonlinearity=cell.removeprefix("rnn_"))
        sizes = [hidden_size * (1 + (index < both)) for index in range(num_layers)]
        self.layers = nn.ModuleList(
            kind(
                below, hidden_size, batch_first=True, bidirectional=index < both, zoneout=zoneout,
                recurrent_dropout=recurrent_dropout, recurrent_dropout_on=recurrent_dropout_on, layer_norm=layer_norm,
                learn_state=learn_state, backend=backend, device=device, dtype=dtype,
            )
            for index, below in enumerate([input_size, *sizes[:-1]])
        )  # fmt: skip
        self.output_size = sizes[-1]

    def forward(
        self,
        x: Tensor,  # [B, S, input_size], or what `embedding` takes
        lengths: Lengths = None,  # [B], any order; None: all S. What stands behind a row's length is never read
    ) -> Memory:
        """The last layer's output [B, S, output_size], 0 behind the lengths; their mask; every layer's last state.

        A row of length 0 gives nothing to attend to, and the states before the first step: 0, or what was learned.
        Raises InputError or TypeError.
        """
        out = self._embedded(x)
        ends = None if lengths is None else checked_lengths(lengths, out, out.shape[0], out.shape[1])
        states: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            below = dropout(out, self.dropout, self.training) if index else out
            out, hidden = layer(below, lengths=ends)
            states.append(_state(hidden))
            if self.residual and index and out.shape == below.shape:
                out = out + below
        return Memory(out, None if ends is None else prefix_mask(ends, out), tuple(states), self._dirs)

    def outline(self) -> Memory | None:
        """A memory of one row and one step as `forward` makes it, on the meta device; None: the layers were changed."""
        states: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            dirs = 1 + (index < self.bidirectional)
            if not isinstance(layer, nn.RNNBase) or layer.hidden_size != self.hidden_size or layer.proj_size:
                return None
            if layer.bidirectional != (dirs == 2) or isinstance(layer, nn.LSTM) != (self.cell == "lstm"):
                return None
            leaf = torch.empty(1, dirs * self.hidden_size, device="meta")
            states.append((leaf, leaf) if self.cell == "lstm" else (leaf,))
        return Memory(torch.empty(1, 1, self.output_size, device="meta"), None, tuple(states), self._dirs)

    @property
    def _dirs(self) -> tuple[int, ...]:
        """Directions of each layer."""
        return tuple(1 + (index < self.bidirectional) for index in range(self.num_layers))

    def _embedded(self, x: Any) -> Tensor:
        """What the first layer reads, [B, S, input_size]; InputError or TypeError where x gives no such tensor."""
        out = x if self.embedding is None else self.embedding(x)
        shape = tuple(need_tensor("x", out).shape)
        if len(shape) != 3 or shape[2] != self.input_size:
            what = "x" if self.embedding is None else "embedding(x)"
            ids = self.embedding is None and len(shape) == 2 and not out.is_floating_point()
            remedy = "; of token ids, with embedding=nn.Embedding(...)" if ids else ""
            raise InputError(
                f"{what} has shape {shape}; expected [B, S, I] with I={self.input_size}, input_size{remedy}"
            )
        return out

    @property
    def backend(self) -> str:
        """The first layer's."""
        return str(self.layers[0].backend)

    def as_call(self, x: Tensor, lengths: Lengths = None) -> RnnCall:
        """The call that the first layer makes of x and lengths; the others differ in size alone."""
        out, layer = self._embedded(x), self.layers[0]
        call = layer.as_call(out) if isinstance(layer, ResetBefore) else call_of(layer, out, None)
        if lengths is not None:
            set_lengths(call, lengths)
        return call

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data; a part is such data with its `kind`."""
        layer = self.layers[0]  # which may have been exchanged for torch's: that is for `save` to refuse
        return described(self, backend=getattr(layer, "backend", "auto"))

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, cell={self.cell!r}"
        for name in ("bidirectional", "dropout", "residual"):
            text += f", {name}={getattr(self, name)}" if getattr(self, name) else ""
        return text


class ResetBefore(GRU):
    """fastseq.GRU with the reset gate before the product: Cho et al. 2014, eq. 5 to 8."""

    _cell = "gru_reset_before"

    def forward(
        self, input: Any, hx: Tensor | None = None, *, lengths: Lengths = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """(output, h_n); input, lengths, resets and faults as for `LSTM.forward`."""
        out, (h,) = run(self.as_call(input, hx), self.backend, lengths, resets)
        return out, h

    def as_call(self, input: Any, hx: Tensor | None = None) -> RnnCall:
        """The call that `forward` makes."""
        call = gru_call(self, input, hx)
        call.cell = self._cell
        return call


def _state(hidden: Any) -> LayerState:
    """(h,) or (h, c), each [B, dirs * H], of one layer's h_n [dirs, B, H] or (h_n, c_n)."""
    leaves = hidden if isinstance(hidden, tuple) else (hidden,)
    return tuple(leaf[0] if leaf.shape[0] == 1 else torch.cat((leaf[0], leaf[1]), -1) for leaf in leaves)
