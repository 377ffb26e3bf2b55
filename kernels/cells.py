"""Element math of the recurrent cells for Triton drivers: csrc/cells.h, which has the equations, once more.

A cell works on COLUMNS pre-activations. `INPUT[column]` is the gate (block of H rows) of W_ih that adds to a column,
`HIDDEN[column]` that of W_hh; -1: none. forward(pre, h, c) gives (h', c', saved); backward(saved, before, after, dh,
carry) gives (the columns' gradients, carry). What carry, before and after are, csrc/cells.h says; c and c' of a cell
without a cell state are h's and meaningless. `update`, of recurrent dropout, multiplies what a step writes; None: by 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastseq.ops import cells

from .blocks import tanh

__all__ = ["CELLS", "Cell", "lstm_written", "written"]


class Cell(NamedTuple):
    """What a driver is handed, piece by piece, as constants."""

    forward: Any
    backward: Any
    gates: int
    columns: int
    INPUT: tuple[int, ...]
    HIDDEN: tuple[int, ...]
    cell_state: bool
    direct: bool  # carry is a part of dL/dh, as a GRU's; otherwise it is dL/dc

    @property
    def PLACE(self) -> tuple[int, ...]:
        """Where backward stores the gradients of the columns."""
        return cells.Columns(0, *self[2:7]).PLACE


@triton.jit
def written(value, update):
    if update is not None:
        value = value * update
    return value


@triton.jit
def lstm(pre, h, c, update=None):
    i = tl.sigmoid(pre[0])
    f = tl.sigmoid(pre[1])
    g = tanh(pre[2])
    o = tl.sigmoid(pre[3])
    c = f * c + i * written(g, update)
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def lstm_backward(saved, before, after, dh, carry, update=None):
    i, f, g, o = saved
    if after is None:
        after = f * before + i * written(g, update)
    squashed = tanh(after)
    dc = carry + dh * o * (1 - squashed * squashed)
    return lstm_written(saved, before, squashed, dh, dc, update)


@triton.jit
def lstm_written(saved, before, squashed, dh, dc, update=None):
    """The LSTM's backward from all of c's gradient on; squashed: what o multiplies."""
    i, f, g, o = saved
    return (
        dc * written(g, update) * i * (1 - i), dc * before * f * (1 - f), written(dc * i, update) * (1 - g * g),
        dh * squashed * o * (1 - o),
    ), dc * f  # fmt: skip


@triton.jit
def gru(pre, h, c, update=None):
    r = tl.sigmoid(pre[0])
    z = tl.sigmoid(pre[1])
    n = tanh(pre[3] + r * pre[2])
    new = written(n, update)
    return new + z * (h - new), c, (r, z, pre[2], n)


@triton.jit
def gru_backward(saved, before, after, dh, carry, update=None):
    r, z, u, n = saved
    dh = dh + carry
    dn = written(dh * (1 - z), update) * (1 - n * n)
    return (dn * u * r * (1 - r), dh * (before - written(n, update)) * z * (1 - z), dn * r, dn), dh * z


@triton.jit
def rnn_tanh(pre, h, c, update=None):  # all of h' is written: nothing of it is dropped
    h = tanh(pre[0])
    return h, c, (h,)


@triton.jit
def rnn_tanh_backward(saved, before, after, dh, carry, update=None):
    return ((dh + carry) * (1 - saved[0] * saved[0]),), tl.zeros_like(carry)


@triton.jit
def rnn_relu(pre, h, c, update=None):
    h = tl.where(pre[0] <= 0, 0.0, pre[0])  # NaN of NaN
    return h, c, (h,)


@triton.jit
def rnn_relu_backward(saved, before, after, dh, carry, update=None):
    return (tl.where(saved[0] <= 0, 0.0, dh + carry),), tl.zeros_like(carry)


CELLS = {
    "lstm": Cell(lstm, lstm_backward, *cells.CELLS["lstm"][1:], direct=False),
    "gru": Cell(gru, gru_backward, *cells.CELLS["gru"][1:], direct=True),
    "rnn_tanh": Cell(rnn_tanh, rnn_tanh_backward, *cells.CELLS["rnn_tanh"][1:], direct=False),
    "rnn_relu": Cell(rnn_relu, rnn_relu_backward, *cells.CELLS["rnn_relu"][1:], direct=False),
}
