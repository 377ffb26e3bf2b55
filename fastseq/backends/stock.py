"""The `torch` backend: PyTorch's own operators (oneDNN, cuDNN), called as torch.nn calls them."""

from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..errors import InputError
from . import stack
from .call import Results, RnnCall

__all__ = ["NAME", "never", "refuses", "rnn", "rnn_cell", "unavailable"]

NAME = "torch"


def unavailable() -> str | None:
    """Always usable."""
    return None


def refuses(call: RnnCall) -> str | None:
    """What PyTorch's operators lack."""
    if (reason := never(call)) is not None:
        return reason
    if call.states:
        return "torch's operators give no cell state but the last"
    if call.resets is not None:
        return "torch's operators have no resets within a sequence"
    if torch.compiler.is_compiling():
        if call.lengths is not None:
            return "torch.compile cannot trace torch's packing of rows with lengths"
        if call.cell == "lstm" and _onednn(call) and torch.is_grad_enabled():
            return "torch.compile cannot differentiate torch's oneDNN LSTM"
    for state in (call.h0, call.c0):
        if state is not None and state.dtype != call.input.dtype:
            return f"torch takes no {state.dtype} state with a {call.input.dtype} input"
    return None


def never(call: RnnCall) -> str | None:
    """What of a layer's own options they lack, whatever it is called with."""
    if call.cell == "gru_reset_before":
        return "torch has no GRU with the reset gate before the product"
    if call.noise is not None:
        return "torch's operators have neither zoneout nor dropout within the recurrence"
    if call.norms is not None:
        return "torch's operators have no layer normalisation within the recurrence"
    return None


def rnn(call: RnnCall) -> Results:
    """A layer stack, in one call of torch's operator."""
    if call.lengths is None:
        return _operator(call, call.input, call.batch_sizes, _states(call))
    _need_values(call.lengths)
    if call.dropout and call.training and call.num_layers > 1:
        return stack.run(call, _layer)  # torch draws over packed rows, every other backend over padded ones
    return _padded(call, call.lengths)


def rnn_cell(call: RnnCall) -> tuple[Tensor, ...]:
    """One step."""
    x, w = call.input, call.weights
    b_ih, b_hh = w[2:] if call.has_bias else (None, None)
    h0 = x.new_zeros(x.shape[0], call.hidden_size) if call.h0 is None else call.h0
    if call.cell != "lstm":
        return (getattr(_VF, f"{call.cell}_cell")(x, h0, w[0], w[1], b_ih, b_hh),)
    c0 = x.new_zeros(x.shape[0], call.hidden_size) if call.c0 is None else call.c0
    return tuple(_VF.lstm_cell(x, (h0, c0), w[0], w[1], b_ih, b_hh))


def _need_values(lengths: Tensor) -> None:
    """InputError where torch.func.vmap hides them: what is packed depends on them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        if torch._C._functorch.is_batchedtensor(lengths):
            raise InputError(
                "backend='torch' packs rows by their lengths, which torch.func.vmap hides; use backend='auto' or"
                " 'reference', or leave vmap out: lengths= are of each row"
            )
        lengths = torch._C._functorch.get_unwrapped(lengths)


def _onednn(call: RnnCall) -> bool:
    x = call.input
    return x.dim() == 3 and x.device.type == "cpu" and x.dtype != torch.float64 and not call.proj_size


def _operator(
    call: RnnCall, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    operator: Any = getattr(_VF, call.cell)  # gru, lstm, rnn_tanh, rnn_relu
    hx: Any = states if call.cell == "lstm" else states[0]
    options = (call.has_bias, call.num_layers, call.dropout, call.training, call.bidirectional)
    if batch_sizes is None:
        out, *finals = operator(x, hx, call.weights, *options, call.batch_first)
    else:
        out, *finals = operator(x, batch_sizes, hx, call.weights, *options)
    return out, tuple(finals)


def _states(call: RnnCall) -> list[Tensor]:
    """h0, and c0 for the LSTM: [L*D, B, P or H], zeros where none is given."""
    rows = call.num_layers * (2 if call.bidirectional else 1)
    h0 = call.h0
    if h0 is None:
        h0 = call.input.new_zeros(rows, call.batch, call.proj_size or call.hidden_size)
    if call.cell != "lstm":
        return [h0]
    return [h0, call.input.new_zeros(rows, call.batch, call.hidden_size) if call.c0 is None else call.c0]


def _padded(call: RnnCall, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows of several lengths, packed and unpacked again; a row of length 0 gives zeros and its initial state."""
    x, states = call.input, _states(call)
    lengths = lengths.cpu().clamp(0, call.steps)  # where packing needs them; those of a GPU nobody has checked
    empty = (lengths == 0).to(x.device)[:, None]  # [B, 1]
    rows = empty[:, None] if call.batch_first else empty
    some_empty = 0 in lengths.tolist()
    if some_empty:  # torch packs no row of length 0: it runs one step on zeros instead, and the result is dropped
        x, given = torch.where(rows, 0.0, x), states
        states = [torch.where(empty, 0.0, s) for s in given]
    packed = pack_padded_sequence(x, lengths.clamp(min=1), call.batch_first, enforce_sorted=False)
    data, batch_sizes, order, back = packed
    assert order is not None  # since enforce_sorted=False
    assert back is not None
    data, finals = _operator(call, data, batch_sizes, [s.index_select(1, order) for s in states])
    finals = tuple(s.index_select(1, back) for s in finals)
    out, _ = pad_packed_sequence(
        PackedSequence(data, batch_sizes, order, back), call.batch_first, total_length=call.steps
    )
    if some_empty:
        out = torch.where(rows, 0.0, out)
        finals = tuple(torch.where(empty, s, n) for s, n in zip(given, finals, strict=True))
    return out, finals


def _layer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor,
    resets: None,
    batch_sizes: None,
    batch_first: bool,
    bidirectional: bool,
    extras: None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer of a stack whose rows have lengths (`stack.Layer`)."""
    per = len(weights) // (2 if bidirectional else 1)
    call = RnnCall(
        cell, x, h0, c0, weights, lengths, has_bias=per > 3, bidirectional=bidirectional, batch_first=batch_first,
        proj_size=weights[-1].shape[0] if per % 2 else 0,
    )  # fmt: skip
    out, (h_n, *c_n) = _padded(call, lengths)
    return out, h_n, c_n[0] if c_n else None, None
