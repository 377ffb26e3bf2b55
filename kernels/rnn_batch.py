"""Where the row-steps of a layer's tensors lie: what kernels make of fastseq/ops/rnn_gpu.py's `Batch`.

Token (t, b) of x, out, gates and all that is like them lies at t * step + b * row of a padded batch, or at
starts[t] + b of a packed one. Direction 1 runs t = T-1 .. 0 and holds its initial state while t >= length.
"""

import triton
import triton.language as tl

__all__ = [
    "before", "bias_rows", "lengths_of", "load_either", "load_or_zeros", "starts_anew", "store_initial", "token",
]  # fmt: skip


@triton.jit
def lengths_of(lengths, rows, rows_in, T):
    """[rows] int32: each row's length within [0, T]; 0 of a row that does not exist."""
    if lengths is None:
        length = tl.where(rows_in, T, 0).to(tl.int32)
    else:
        length = tl.load(lengths + rows, rows_in, 0)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
    return length


@triton.jit
def token(t, rows, there, starts, step, row):
    """[rows] int64: where token (t[b], rows[b]) lies; whatever of rows that are not `there`."""
    if starts is None:
        at = t.to(tl.int64) * step + rows * row  # int64 first: T * B * H passes 2**31
    else:
        at = tl.load(starts + t, there, 0) + rows
    return at


@triton.jit
def before(t, d, length):
    """([rows] the step before step t in direction d, whether it is one; otherwise the initial state is before t)."""
    t = tl.where(d == 0, t - 1, t + 1)
    return t, (t >= 0) & (t < length)


@triton.jit
def starts_anew(resets, t, d, length, there, rows, starts, step, row):
    """[rows]: which of those that are `there` start from zeros at step t of direction d.

    Where a segment begins, forward; in reverse at its end, before which the next one begins, within the row's length.
    """
    begin = tl.where(d == 0, t, t + 1)
    there &= begin < length
    return tl.load(resets + token(begin, rows, there, starts, step, row), there, 0) != 0


@triton.jit
def load_either(p_steps, at, steps, p_initial, initial_at, initial):
    """[rows, units] fp32: of p_steps where the mask `steps` says so, of p_initial (or 0) where `initial` does."""
    value = tl.load(p_steps + at, steps, 0.0).to(tl.float32)
    if p_initial is not None:
        value += tl.load(p_initial + initial_at, initial, 0.0).to(tl.float32)
    return value


@triton.jit
def load_or_zeros(p, at, there):
    """[rows, units] fp32: of p, or zeros where there is no p."""
    value = tl.zeros(at.shape, tl.float32)
    if p is not None:
        value = tl.load(p + at, there, 0.0).to(tl.float32)
    return value


@triton.jit
def store_initial(d_h0, d_c0, dh, carry, at, there, DIRECT: tl.constexpr):
    """The initial state's gradients, of those that are wanted. DIRECT: carry is of h."""
    if d_h0 is not None:
        if DIRECT:
            dh += carry
        tl.store(d_h0 + at, dh.to(d_h0.dtype.element_ty), there)
    if d_c0 is not None:
        tl.store(d_c0 + at, carry.to(d_c0.dtype.element_ty), there)


@triton.jit
def bias_rows(
    b_ih,  # [G * H] or None
    b_ih_reverse,  # of direction 1
    b_hh,
    b_hh_reverse,
    d,
    units,
    units_in,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
):
    """For each column [units] fp32: the biases that add to it."""
    if b_ih is not None:
        p_input = b_ih
        p_hidden = b_hh
        if DIRECTIONS == 2:
            if d == 1:
                p_input = b_ih_reverse
                p_hidden = b_hh_reverse
    rows = ()
    for k in tl.static_range(COLUMNS):
        bias = tl.zeros_like(units).to(tl.float32)
        if b_ih is not None:
            if INPUT[k] >= 0:
                bias += tl.load(p_input + INPUT[k] * H + units, units_in, 0.0).to(tl.float32)
            if HIDDEN[k] >= 0:
                bias += tl.load(p_hidden + HIDDEN[k] * H + units, units_in, 0.0).to(tl.float32)
        rows = rows + (bias,)
    return rows
