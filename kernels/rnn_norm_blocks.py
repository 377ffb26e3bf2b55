"""What the kernels of layer normalisation share: statistics of blocks of gates, and both ways through them.

`columns` are fp32 tiles [rows, units], one a gate, 0 where there is no unit; a block of them is columns[FIRST:END].
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastseq.ops.rnn_norm import STATS

from .blocks import tanh
from .cells import lstm_written, written
from .rnn_noise import held_c, update_of

__all__ = [
    "EPS", "PER_TOKEN", "Norms", "c_made", "gradient_sums", "hats_of", "joined", "load_columns", "lstm_backward",
    "pre_activations", "read", "read_backward", "spread", "store_columns", "through", "through_gains", "whole_hats",
]  # fmt: skip

EPS = tl.constexpr(1e-5)
PER_TOKEN = tl.constexpr(STATS)


class Norms(NamedTuple):
    """Of N(W_ih x), N(W_hh h) and N(c)."""

    gain_x: Any  # [G * H]
    bias_x: Any  # [G * H] or None
    gain: Any
    bias: Any
    cell_gain: Any  # [H] or None
    cell_bias: Any


@triton.jit
def spread(columns, FIRST: tl.constexpr, END: tl.constexpr, units_in, count):
    """(mean, squares around it) [rows] of a block, `count` numbers a row."""
    total = tl.sum(columns[FIRST], 1)
    for g in tl.static_range(FIRST + 1, END):
        total += tl.sum(columns[g], 1)
    mean = total / count
    squares = tl.zeros_like(mean)
    for g in tl.static_range(FIRST, END):
        off = tl.where(units_in[None, :], columns[g] - mean[:, None], 0.0)
        squares += tl.sum(off * off, 1)
    return mean, squares


@triton.jit
def whole_hats(columns, FIRST: tl.constexpr, END: tl.constexpr, units_in, H: tl.constexpr):
    """(N of a block, mean, 1 / deviation) where the tiles have all units."""
    mean, squares = spread(columns, FIRST, END, units_in, (END - FIRST) * H)
    scale = 1 / tl.sqrt(squares / ((END - FIRST) * H) + EPS)
    return hats_of(columns, FIRST, END, mean, scale, units_in[None, :]), mean, scale


@triton.jit
def joined(count, mean, squares, more, more_mean, more_squares):
    """Those of two sets of numbers as one's (Chan, Golub and LeVeque 1979); the first may be empty."""
    total = count + more
    off = more_mean - mean
    mean += off * (more / total)
    return total, mean, squares + more_squares + off * off * (count * (more / total))


@triton.jit
def hats_of(columns, FIRST: tl.constexpr, END: tl.constexpr, mean, scale, there):
    """N of a block; 0 where nothing is there."""
    hats = ()
    for g in tl.static_range(FIRST, END):
        hats = hats + (tl.where(there, (columns[g] - mean[:, None]) * scale[:, None], 0.0),)
    return hats


@triton.jit
def gradient_sums(d_hats, hats, FIRST: tl.constexpr, END: tl.constexpr):
    """What backward needs of a block's row: the sums of the hats' gradients and of their products with the hats."""
    plain = tl.sum(d_hats[FIRST], 1)
    by_hat = tl.sum(d_hats[FIRST] * hats[FIRST], 1)
    for g in tl.static_range(FIRST + 1, END):
        plain += tl.sum(d_hats[g], 1)
        by_hat += tl.sum(d_hats[g] * hats[g], 1)
    return plain, by_hat


@triton.jit
def through(d_hats, hats, FIRST: tl.constexpr, END: tl.constexpr, plain, by_hat, H: tl.constexpr, scale, there):
    """Gradients of what was normalised, from those of the hats; plain, by_hat: `gradient_sums` of whole rows."""
    plain = plain / ((END - FIRST) * H)
    by_hat = by_hat / ((END - FIRST) * H)
    found = ()
    for g in tl.static_range(FIRST, END):
        d = (d_hats[g] - plain[:, None] - hats[g] * by_hat[:, None]) * scale[:, None]
        found = found + (tl.where(there, d, 0.0),)
    return found


@triton.jit
def load_columns(p, mask, units, COUNT: tl.constexpr, H: tl.constexpr):
    """COUNT tiles fp32 at p [rows, 1], H apart."""
    found = ()
    for g in tl.static_range(COUNT):
        found = found + (tl.load(p + g * H + units[None, :], mask, 0.0).to(tl.float32),)
    return found


@triton.jit
def store_columns(p, columns, mask, units, H: tl.constexpr):
    for g in tl.static_range(len(columns)):
        tl.store(p + g * H + units[None, :], columns[g].to(p.dtype.element_ty), mask)


@triton.jit
def load_row(p, g: tl.constexpr, units, units_in, H: tl.constexpr):
    """[1, units] fp32 of p [.., H] or None, which is 0."""
    row = tl.zeros_like(units).to(tl.float32)
    if p is not None:
        row = tl.load(p + g * H + units, units_in, 0.0).to(tl.float32)
    return row[None, :]


@triton.jit
def pre_activations(
    hats_x, hats, norms, units, units_in, INPUT: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    """The cell's columns: what of both products is normalised, times gains, plus biases."""
    pre = ()
    for k in tl.static_range(COLUMNS):
        column = tl.zeros_like(hats[0])
        if INPUT[k] >= 0:
            column += hats_x[INPUT[k]] * load_row(norms.gain_x, INPUT[k], units, units_in, H)
            column += load_row(norms.bias_x, INPUT[k], units, units_in, H)
        if HIDDEN[k] >= 0:
            column += hats[HIDDEN[k]] * load_row(norms.gain, HIDDEN[k], units, units_in, H)
            column += load_row(norms.bias, HIDDEN[k], units, units_in, H)
        pre = pre + (column,)
    return pre


@triton.jit
def through_gains(
    d_pre, norms, units, units_in, there, HIDDEN: tl.constexpr, GATES: tl.constexpr, COLUMNS: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    """Gradients of N(W_hh h) from the columns'."""
    d_hats = ()
    for g in tl.static_range(GATES):
        for k in tl.static_range(COLUMNS):
            if HIDDEN[k] == g:
                d_hats = d_hats + (tl.where(there, d_pre[k] * load_row(norms.gain, g, units, units_in, H), 0.0),)
    return d_hats


@triton.jit
def read(o, hat_c, norms, units, units_in, H: tl.constexpr):
    """h of a cell that reads c normalised."""
    seen = hat_c * load_row(norms.cell_gain, 0, units, units_in, H)
    return o * tanh(seen + load_row(norms.cell_bias, 0, units, units_in, H))


@triton.jit
def read_backward(o, hat_c, norms, dh, units, units_in, H: tl.constexpr):
    """(tanh of what h reads, that's gradient, that of N(c)) from dL/dh."""
    gain = load_row(norms.cell_gain, 0, units, units_in, H)
    squashed = tanh(hat_c * gain + load_row(norms.cell_bias, 0, units, units_in, H))
    d_read = dh * o * (1 - squashed * squashed)
    return squashed, d_read, d_read * gain


@triton.jit
def c_made(saved, before, masks, at, there):
    """c' as an LSTM's cell made it, of which h is, where masks then kept some of c: what was saved is what came of it.
    masks, at, there: as rnn_noise.py has them.
    """
    i, f, g, _ = saved
    update = None
    if masks.update is not None:
        update = update_of(masks, at, there)
    return f * before + i * written(g, update)


@triton.jit
def lstm_backward(saved, before, squashed, dh, dc, of_read, masks, at, there):
    """(gradients of the columns, dL/dc before) of an LSTM that reads c normalised.

    dc: the gradient of the state that came out of the step; of_read: of c' as the cell made it, by way of h.
    """
    update = None
    if masks.update is not None:
        update = update_of(masks, at, there)
    if (masks.hold_c is not None) or (masks.share_c is not None):
        held = held_c(dc, tl.zeros_like(dc), masks, at, there)
        d_pre, carry = lstm_written(saved, before, squashed, dh, dc - held + of_read, update)
        carry += held
    else:
        d_pre, carry = lstm_written(saved, before, squashed, dh, dc + of_read, update)
    return d_pre, carry
