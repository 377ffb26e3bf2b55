"""A layer's whole recurrence in one program a block of rows: W_hh stays on chip for the whole time loop.

For sizes whose W_hh one program can hold; which those are says configs.json. State and carried gradients are fp32 and
never leave the program.
"""

import triton
import triton.language as tl

from .blocks import dot
from .rnn_batch import (
    before,
    bias_rows,
    lengths_of,
    load_either,
    load_or_zeros,
    starts_anew,
    store_initial,
    token,
)
from .rnn_noise import masked, masked_backward, step_back

__all__ = ["backward_kernel", "forward_kernel"]

_SIZES = ["T", "B", "tokens", "step", "row"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    inputs,  # [D, tokens, G * H]: x W_ih'
    w_hh,  # [G * H, H]
    w_hh_reverse,  # of direction 1, or None
    b_ih,  # [G * H] or None
    b_ih_reverse,
    b_hh,
    b_hh_reverse,
    h0,  # [D, B, H] or None
    c0,
    lengths,  # [B] or None
    starts,  # [T] or None
    resets,  # [tokens] uint8 or None: not 0 where a segment begins
    out,  # [tokens, D, H], 0 behind the lengths
    h_n,  # [D, B, H]
    c_n,  # the same, or None
    gates,  # [D, tokens, COLUMNS, H] or None
    cells,  # [D, tokens, H] fp32 or None
    masks,  # rnn_noise.Masks if MASKED
    recurrent,  # [D, B, H] or None: multiplies h on its way into W_hh
    T,
    B,
    tokens,
    step,
    row,
    CELL: tl.constexpr,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    MASKED: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    units = tl.arange(0, BLOCK_UNITS)
    units_in = units < H
    tile_in = rows_in[:, None] & units_in[None, :]
    state_at = (d * B + rows)[:, None] * H + units[None, :]
    length = lengths_of(lengths, rows, rows_in, T)
    w = w_hh
    if DIRECTIONS == 2:
        if d == 1:
            w = w_hh_reverse
    biases = bias_rows(
        b_ih, b_ih_reverse, b_hh, b_hh_reverse, d, units, units_in, INPUT, HIDDEN, COLUMNS, DIRECTIONS, H
    )  # fmt: skip
    square = units_in[:, None] & units_in[None, :]
    weights = ()
    for g in tl.static_range(GATES):
        weights = weights + (tl.load(w + (g * H + units[None, :]) * H + units[:, None], square, 0.0),)
    h = load_or_zeros(h0, state_at, tile_in)
    c = load_or_zeros(c0, state_at, tile_in)
    if recurrent is not None:
        factor = tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
    steps = tl.max(length)
    for s in range(steps):
        t = tl.where(d == 0, s, steps - 1 - s) + tl.zeros_like(length)
        active = t < length
        here = active[:, None] & units_in[None, :]
        at = token(t, rows, active, starts, step, row)
        p_input = inputs + (d * tokens + at)[:, None] * (GATES * H) + units[None, :]
        if resets is not None:
            anew = starts_anew(resets, t, d, length, active, rows, starts, step, row)
            h = tl.where(anew[:, None], 0.0, h)
            c = tl.where(anew[:, None], 0.0, c)
        h_in = h
        if recurrent is not None:
            h_in = h * factor
        h_in = h_in.to(w_hh.dtype.element_ty)
        pre = ()
        for k in tl.static_range(COLUMNS):
            column = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32) + biases[k][None, :]
            if INPUT[k] >= 0:
                column += tl.load(p_input + INPUT[k] * H, here, 0.0).to(tl.float32)
            if HIDDEN[k] >= 0:
                column = dot(h_in, weights[HIDDEN[k]], column, PRECISION)
            pre = pre + (column,)
        if not MASKED:
            new_h, new_c, saved = CELL(pre, h, c)
        else:
            own = (at * DIRECTIONS + d)[:, None] * H + units[None, :]
            new_h, new_c, saved = masked(CELL, pre, h, c, masks, own, here)
        h = tl.where(active[:, None], new_h, h)
        p_out = out + (at * DIRECTIONS + d)[:, None] * H + units[None, :]
        tl.store(p_out, new_h.to(out.dtype.element_ty), here)
        if CELL_STATE:
            c = tl.where(active[:, None], new_c, c)
            if cells is not None:
                tl.store(cells + (d * tokens + at)[:, None] * H + units[None, :], new_c, here)
        if gates is not None:
            p_gates = gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
            for k in tl.static_range(COLUMNS):
                tl.store(p_gates + k * H, saved[k].to(gates.dtype.element_ty), here)
    tl.store(h_n + state_at, h.to(h_n.dtype.element_ty), tile_in)
    if CELL_STATE:
        tl.store(c_n + state_at, c.to(c_n.dtype.element_ty), tile_in)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    d_out,  # [tokens, D, H] or None
    d_h_n,  # [D, B, H] or None
    d_c_n,
    d_cells,  # [D, tokens, H] fp32 or None: of c of every step
    w_hh,  # [G * H, H]
    w_hh_reverse,
    h0,  # [D, B, H] or None
    c0,
    lengths,
    starts,
    resets,
    out,  # [tokens, D, H]
    gates,  # [D, tokens, COLUMNS, H]
    cells,  # [D, tokens, H] fp32 or None
    d_gates,  # [D, tokens, COLUMNS, H], 0 behind the lengths; column k at PLACE[k]
    h_before,  # [D, tokens, H] or None: what W_hh multiplied
    d_h0,  # [D, B, H] or None
    d_c0,
    masks,  # rnn_noise.Masks if MASKED
    recurrent,  # [D, B, H] or None: multiplies h on its way into W_hh
    T,
    B,
    tokens,
    step,
    row,
    CELL: tl.constexpr,
    HIDDEN: tl.constexpr,
    PLACE: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    MASKED: tl.constexpr,
    DIRECT: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    units = tl.arange(0, BLOCK_UNITS)
    units_in = units < H
    tile_in = rows_in[:, None] & units_in[None, :]
    state_at = (d * B + rows)[:, None] * H + units[None, :]
    length = lengths_of(lengths, rows, rows_in, T)
    w = w_hh
    if DIRECTIONS == 2:
        if d == 1:
            w = w_hh_reverse
    square = units_in[:, None] & units_in[None, :]
    weights = ()
    for g in tl.static_range(GATES):
        weights = weights + (tl.load(w + (g * H + units[:, None]) * H + units[None, :], square, 0.0),)
    dh = load_or_zeros(d_h_n, state_at, tile_in)
    carry = load_or_zeros(d_c_n, state_at, tile_in)
    steps = tl.max(length)
    for s in range(steps):
        t = tl.where(d == 0, steps - 1 - s, s) + tl.zeros_like(length)
        active = t < length
        here = active[:, None] & units_in[None, :]
        at = token(t, rows, active, starts, step, row)
        earlier, is_step = before(t, d, length)
        is_step &= active
        is_first = active & ~is_step
        if resets is not None:
            anew = starts_anew(resets, t, d, length, active, rows, starts, step, row)
            is_step &= ~anew
            is_first &= ~anew
        earlier_at = token(earlier, rows, is_step, starts, step, row)
        from_step = is_step[:, None] & units_in[None, :]
        from_initial = is_first[:, None] & units_in[None, :]
        grad = dh
        if d_out is not None:
            p_out = d_out + (at * DIRECTIONS + d)[:, None] * H + units[None, :]
            grad += tl.load(p_out, here, 0.0).to(tl.float32)
        p_gates = gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
        saved = ()
        for k in tl.static_range(COLUMNS):
            saved = saved + (tl.load(p_gates + k * H, here, 0.0).to(tl.float32),)
        if (not CELL_STATE) or (h_before is not None):
            out_at = (earlier_at * DIRECTIONS + d)[:, None] * H + units[None, :]
            h_in = load_either(out, out_at, from_step, h0, state_at, from_initial)
            if h_before is not None:
                p_before = h_before + (d * tokens + at)[:, None] * H + units[None, :]
                multiplied = h_in
                if recurrent is not None:
                    multiplied = h_in * tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
                tl.store(p_before, multiplied.to(h_before.dtype.element_ty), here)
        if CELL_STATE:
            after = tl.load(cells + (d * tokens + at)[:, None] * H + units[None, :], here, 0.0)
            cell_at = (d * tokens + earlier_at)[:, None] * H + units[None, :]
            earlier_state = load_either(cells, cell_at, from_step, c0, state_at, from_initial)
            arrived = carry
            if d_cells is not None:
                arrived += tl.load(d_cells + (d * tokens + at)[:, None] * H + units[None, :], here, 0.0)
        else:
            after = h_in
            earlier_state = h_in
            arrived = carry
        if not MASKED:
            d_pre, new_carry = CELL(saved, earlier_state, after, grad, arrived)
        else:
            own = (at * DIRECTIONS + d)[:, None] * H + units[None, :]
            d_pre, new_carry, kept = masked_backward(
                CELL, CELL_STATE, saved, earlier_state, after, grad, arrived, masks, own, here
            )
            if resets is not None:
                kept = tl.where(anew[:, None], 0.0, kept)
            dh = tl.where(active[:, None], kept, dh)  # before the products: a tile less to keep meanwhile
        if resets is not None:
            new_carry = tl.where(anew[:, None], 0.0, new_carry)
        p_grads = d_gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
        new_dh = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        for k in tl.static_range(COLUMNS):
            of_column = d_pre[k].to(d_gates.dtype.element_ty)
            tl.store(p_grads + PLACE[k] * H, of_column, here)
            if HIDDEN[k] >= 0:
                if resets is not None:  # of the operand: a select of the sums takes 130 registers more
                    of_column = tl.where(anew[:, None], 0.0, of_column)
                new_dh = dot(of_column, weights[HIDDEN[k]], new_dh, PRECISION)
        dh, carry = step_back(dh, new_dh, carry, new_carry, active, recurrent, state_at, tile_in, MASKED)
    store_initial(d_h0, d_c0, dh, carry, state_at, tile_in, DIRECT)
