"""Element math of the recurrent cells for Triton drivers: csrc/cells.h, which has the equations, once more.

A cell works on COLUMNS pre-activations. `INPUT[column]` is the gate (block of H rows) of W_ih that adds to a column,
`HIDDEN[column]` that of W_hh; -1: none. forward(pre, h, c) gives (h', c', saved); backward(saved, before, after, dh,
carry) gives (the columns' gradients, carry). What carry, before and after are, csrc/cells.h says; c and c' of a cell
without a cell state are h's and meaningless.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastseq.ops import cells

from .blocks import tanh

__all__ = ["CELLS", "Cell"]


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
def lstm(pre, h, c):
    i = tl.sigmoid(pre[0])
    f = tl.sigmoid(pre[1])
    g = tanh(pre[2])
    o = tl.sigmoid(pre[3])
    c = f * c + i * g
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def lstm_backward(saved, before, after, dh, carry):
    i, f, g, o = saved
    squashed = tanh(after)
    dc = carry + dh * o * (1 - squashed * squashed)
    return (
        dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)
    ), dc * f  # fmt: skip


@triton.jit
def gru(pre, h, c):
    r = tl.sigmoid(pre[0])
    z = tl.sigmoid(pre[1])
    n = tanh(pre[3] + r * pre[2])
    return n + z * (h - n), c, (r, z, pre[2], n)


@triton.jit
def gru_backward(saved, before, after, dh, carry):
    r, z, u, n = saved
    dh = dh + carry
    dn = dh * (1 - z) * (1 - n * n)
    return (dn * u * r * (1 - r), dh * (before - n) * z * (1 - z), dn * r, dn), dh * z


@triton.jit
def rnn_tanh(pre, h, c):
    h = tanh(pre[0])
    return h, c, (h,)


@triton.jit
def rnn_tanh_backward(saved, before, after, dh, carry):
    return ((dh + carry) * (1 - saved[0] * saved[0]),), tl.zeros_like(carry)


@triton.jit
def rnn_relu(pre, h, c):
    h = tl.where(pre[0] <= 0, 0.0, pre[0])  # NaN of NaN
    return h, c, (h,)


@triton.jit
def rnn_relu_backward(saved, before, after, dh, carry):
    return (tl.where(saved[0] <= 0, 0.0, dh + carry),), tl.zeros_like(carry)


CELLS = {
    "lstm": Cell(lstm, lstm_backward, *cells.CELLS["lstm"][1:], direct=False),
    "gru": Cell(gru, gru_backward, *cells.CELLS["gru"][1:], direct=True),
    "rnn_tanh": Cell(rnn_tanh, rnn_tanh_backward, *cells.CELLS["rnn_tanh"][1:], direct=False),
    "rnn_relu": Cell(rnn_relu, rnn_relu_backward, *cells.CELLS["rnn_relu"][1:], direct=False),
}
