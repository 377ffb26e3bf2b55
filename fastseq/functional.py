"""LSTM, GRU, RNN, attention, attention decoders and the loss of large vocabularies as functions of their weights.

The `weights` of layers and cells are flat, as torch.nn's modules order them: for each layer, for each direction,
w_ih [G*H, I], w_hh [G*H, P] (, b_ih [G*H], b_hh [G*H]) (, w_hr [P, H]); the number of layers, biases and the projection
size P (or H) follow from them. Those of a decoder are a `DecoderParams`, of an attention an `AttentionParams`.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .backends.call import GATES, RnnCall
from .backends.decoder_call import AttentionCall, DecoderCall
from .checks import checked_lengths, need_tensor
from .decoding import run_attention, run_decoder
from .engine import run, run_cell
from .errors import InputError
from .losses import linear_cross_entropy
from .spec import AttentionParams, DecoderOutput, DecoderParams, DecoderSpec, DecoderState, DropoutMasks, Keys

__all__ = [
    "attention", "attention_decoder", "gru", "gru_cell", "linear_cross_entropy", "lstm", "lstm_cell", "reverse", "rnn",
    "rnn_cell",
]  # fmt: skip

Lengths = Sequence[int] | Tensor | None


@overload
def lstm(
    input: PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    backend: str = ...,
) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
@overload
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    lengths: Lengths = ...,
    resets: Tensor | None = ...,
    bidirectional: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
def lstm(
    input: Any,  # [T, B, I]; [B, T, I] if batch_first; [T, I]; or a PackedSequence
    hx: tuple[Tensor, Tensor] | None,  # h0 [L*D, B, P], c0 [L*D, B, H]; None: zeros
    weights: Sequence[Tensor],
    *,
    lengths: Lengths = None,  # [B], any order, any integer dtype
    resets: Tensor | None = None,  # bool, the input's leading dimensions
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,  # between layers, when training
    training: bool = False,
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """LSTM layers (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000): (output, (h_n, c_n)).

    Output has D*P features in the input's layout; behind a row's length it is 0, and h_n, c_n are its last states.
    Where resets is True a segment of the row begins: the state, hx included, is zeroed before that step, and the
    reverse direction's before the step in front of it, so that segments give what they give alone.
    Raises InputError or TypeError, naming the argument.
    """
    h0, c0 = state_pair(hx)
    flat = list(weights)
    bias, layers, proj = _structure("lstm", flat, 2 if bidirectional else 1)
    call = RnnCall(
        "lstm", input, h0, c0, flat, None, None, bias, layers, dropout, training, bidirectional, batch_first, proj
    )  # fmt: skip
    out, (h, c) = run(call, backend, lengths, resets)
    return out, (h, c)


@overload
def gru(
    input: PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bidirectional: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    reset_after: bool = ...,
    backend: str = ...,
) -> tuple[PackedSequence, Tensor]: ...
@overload
def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    lengths: Lengths = ...,
    resets: Tensor | None = ...,
    bidirectional: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    reset_after: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def gru(
    input: Any,  # as for lstm
    hx: Tensor | None,  # [L*D, B, H]; None: zeros
    weights: Sequence[Tensor],
    *,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset_after: bool = True,
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """GRU layers: (output, h_n). reset_after=False is Cho et al. 2014, eq. 5-8; True is torch.nn.GRU and cuDNN.

    Output, lengths, resets and faults as for `lstm`.
    """
    cell = gru_name(reset_after)
    flat = list(weights)
    bias, layers, _ = _structure(cell, flat, 2 if bidirectional else 1)
    call = RnnCall(cell, input, hx, None, flat, None, None, bias, layers, dropout, training, bidirectional, batch_first)
    out, (h,) = run(call, backend, lengths, resets)
    return out, h


@overload
def rnn(
    input: PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = ...,
    bidirectional: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    backend: str = ...,
) -> tuple[PackedSequence, Tensor]: ...
@overload
def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = ...,
    lengths: Lengths = ...,
    resets: Tensor | None = ...,
    bidirectional: bool = ...,
    batch_first: bool = ...,
    dropout: float = ...,
    training: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def rnn(
    input: Any,  # as for `lstm`
    hx: Tensor | None,  # [L*D, B, H]; None: zeros
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",  # | "relu"
    lengths: Lengths = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """Plain recurrent layers (Elman 1990), h' = f(W_hh h + b_hh + W_ih x + b_ih): (output, h_n).

    Output, lengths, resets and faults as for `lstm`.
    """
    cell = rnn_name(nonlinearity)
    flat = list(weights)
    bias, layers, _ = _structure(cell, flat, 2 if bidirectional else 1)
    call = RnnCall(cell, input, hx, None, flat, None, None, bias, layers, dropout, training, bidirectional, batch_first)
    out, (h,) = run(call, backend, lengths, resets)
    return out, h


def lstm_cell(
    input: Tensor,  # [B, I] or [I]
    hx: tuple[Tensor, Tensor] | None,  # h, c [B, H] or [H]; None: zeros
    weights: Sequence[Tensor],  # w_ih, w_hh (, b_ih, b_hh)
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One LSTM step: the next (h, c)."""
    h0, c0 = state_pair(hx)
    flat = list(weights)
    h, c = run_cell(RnnCall("lstm", input, h0, c0, flat, has_bias=_cell_bias(flat)), backend)
    return h, c


def gru_cell(
    input: Tensor,  # [B, I] or [I]
    hx: Tensor | None,  # [B, H] or [H]; None: zeros
    weights: Sequence[Tensor],  # w_ih, w_hh (, b_ih, b_hh)
    *,
    reset_after: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One GRU step: the next h."""
    flat = list(weights)
    call = RnnCall(gru_name(reset_after), input, hx, None, flat, has_bias=_cell_bias(flat))
    return run_cell(call, backend)[0]


def rnn_cell(
    input: Tensor,  # [B, I] or [I]
    hx: Tensor | None,  # [B, H] or [H]; None: zeros
    weights: Sequence[Tensor],  # w_ih, w_hh (, b_ih, b_hh)
    *,
    nonlinearity: str = "tanh",  # | "relu"
    backend: str = "auto",
) -> Tensor:
    """One step of a plain recurrent layer: the next h."""
    flat = list(weights)
    call = RnnCall(rnn_name(nonlinearity), input, hx, None, flat, has_bias=_cell_bias(flat))
    return run_cell(call, backend)[0]


def attention(
    query: Tensor,  # [N, Q], or [N, T, Q]: T queries a row; N = B * k, row n reads keys n // k
    keys: Keys,
    params: AttentionParams,
    *,
    window: int | None = None,  # D of local-p attention, with params.window
    need_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Scores, masked softmax, context: (context [N, D] or [N, T, D], weights [N, S] or [N, T, S], else None).

    v . tanh(key + W_q query) where params.v is given (Bahdanau et al. 2014, A.1.2), else key . W_q query (Luong et al.
    2015, section 3.1); with a window, eq. 9 and 10 there. Softmax and sums in fp32 at least; under autocast all else,
    and the results, in its dtype. What stands behind mask False is never read; a row without anything to attend to
    gives 0. Weights are differentiable. Raises InputError or TypeError, naming the argument.
    """
    one = need_tensor("query", query).dim() == 2
    call = AttentionCall(query[:, None] if one else query, keys, params, window, need_weights)
    context, weights = run_attention(call, backend)
    if one:
        return context[:, 0], None if weights is None else weights[:, 0]
    return context, weights


def attention_decoder(
    y: Tensor,  # [N, T, I]; N = B * k, row n reads keys n // k
    keys: Keys,
    state: DecoderState,
    params: DecoderParams,
    spec: DecoderSpec,
    *,
    dropout_masks: DropoutMasks | None = None,
    need_weights: bool = False,
    backend: str = "auto",
) -> DecoderOutput:
    """A whole teacher-forced decoder as one operator: (output [N, T, R], state, weights [N, T, S] or None).

    What a step computes is told in `DecoderSpec`. Output and weights have y's dtype, every part of the state the dtype
    it came in: y's, or fp32 beside an fp16 or bf16 y. Under autocast output and weights are in its dtype, the state in
    fp32. Without attention the weights are None. Raises InputError or TypeError, naming the argument.
    """
    masks = DropoutMasks() if dropout_masks is None else dropout_masks
    return run_decoder(DecoderCall(spec, y, keys, state, params, masks, need_weights), backend)


def reverse(
    x: Tensor,  # [B, T, ...], any dtype
    lengths: Lengths,  # [B], any order, any integer dtype; None: T
) -> Tensor:
    """Each row's first `length` steps in the opposite order; what stands behind them stays where it is."""
    if need_tensor("x", x).dim() < 2:
        raise InputError(f"x has shape {tuple(x.shape)}, {x.dim()}-D; expected [B, T, ...]")
    if lengths is None:
        return x.flip(1)
    batch, steps = x.shape[:2]
    ends = checked_lengths(lengths, x, batch, steps).to(x.device).clamp(0, steps)[:, None]
    places = torch.arange(steps, device=x.device)
    return x[torch.arange(batch, device=x.device)[:, None], torch.where(places < ends, ends - 1 - places, places)]


def state_pair(hx: Any) -> tuple[Any, Any]:
    """An LSTM's (h0, c0); a pair of None where `hx` is None."""
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        kind = f"{type(hx).__name__} of length {len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx of an LSTM must be a pair (h0, c0), got {kind}")
    return hx[0], hx[1]


def gru_name(reset_after: bool) -> str:
    """The cell's key in GATES."""
    return "gru" if reset_after else "gru_reset_before"


def rnn_name(nonlinearity: str) -> str:
    """The cell's key in GATES."""
    if nonlinearity not in ("tanh", "relu"):
        raise InputError(f"nonlinearity={nonlinearity!r}; use 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"


def _structure(cell: str, weights: list[Tensor], directions: int) -> tuple[bool, int, int]:
    """(has_bias, num_layers, proj_size) from the flat weights' number and shapes."""
    if len(weights) < 2:
        raise InputError(f"{len(weights)} weights; expected at least w_ih and w_hh for each layer and direction")
    for k, w in enumerate(weights):
        need_tensor(f"weights[{k}]", w)
    bias = len(weights) > 2 and weights[2].dim() == 1
    hidden, state = weights[0].shape[0] // GATES[cell], weights[1].shape[-1]
    proj = state if cell == "lstm" and state < hidden else 0
    per = (4 if bias else 2) + (proj > 0)
    layers, rest = divmod(len(weights), per * directions)
    if rest or not layers:
        raise InputError(
            f"{len(weights)} weights; expected a multiple of {per} per layer times {directions} direction(s)"
        )
    return bias, layers, proj


def _cell_bias(weights: list[Tensor]) -> bool:
    """Whether a cell's flat weights hold biases."""
    if len(weights) not in (2, 4):
        raise InputError(f"{len(weights)} weights; a cell takes w_ih, w_hh, and optionally b_ih, b_hh")
    return len(weights) == 4
