"""A layer-normalised recurrence in one program a block of rows: W_hh stays on chip for the whole time loop.

For sizes whose W_hh one program can hold, as rnn_sequence.py; which those are says configs.json. A program's tiles hold
whole rows, of which statistics are.
"""

import triton
import triton.language as tl

from .blocks import dot
from .rnn_batch import before, lengths_of, load_either, load_or_zeros, starts_anew, store_initial, token
from .rnn_noise import held_c, held_h, masked_backward, step_back, stepped
from .rnn_norm_blocks import (
    PER_TOKEN,
    c_made,
    gradient_sums,
    load_columns,
    lstm_backward,
    pre_activations,
    read,
    read_backward,
    store_columns,
    through,
    through_gains,
    whole_hats,
)

__all__ = ["backward_kernel", "forward_kernel"]

_SIZES = ["T", "B", "tokens", "step", "row", "d"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    hats_x,  # [tokens, G * H]: N of x W_ih'
    w_hh,  # [G * H, H]
    norms,  # rnn_norm_blocks.Norms
    h0,  # [B, H] or None
    c0,
    lengths,  # [B] or None
    starts,  # [T] or None
    resets,  # [tokens] uint8 or None
    out,  # [tokens, H], 0 behind the lengths
    h_n,  # [B, H]
    c_n,  # the same, or None
    hats,  # [tokens, G * H] or None, and so the next three
    gates,  # [tokens, COLUMNS, H]
    cells,  # [tokens, H] fp32
    stats,  # [tokens, STATS] fp32
    masks,  # rnn_noise.Masks
    recurrent,  # [B, H] or None: multiplies h on its way into W_hh
    T,
    B,
    tokens,
    step,
    row,
    d,  # 1: in reverse
    CELL: tl.constexpr,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    SPLIT: tl.constexpr,  # gates of the first block of statistics
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    units = tl.arange(0, BLOCK_UNITS)
    units_in = units < H
    tile_in = rows_in[:, None] & units_in[None, :]
    state_at = rows[:, None] * H + units[None, :]
    length = lengths_of(lengths, rows, rows_in, T)
    square = units_in[:, None] & units_in[None, :]
    weights = ()
    for g in tl.static_range(GATES):
        weights = weights + (tl.load(w_hh + (g * H + units[None, :]) * H + units[:, None], square, 0.0),)
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
        if resets is not None:
            anew = starts_anew(resets, t, d, length, active, rows, starts, step, row)
            h = tl.where(anew[:, None], 0.0, h)
            c = tl.where(anew[:, None], 0.0, c)
        state = at[:, None] * H + units[None, :]
        of_x = load_columns(hats_x + at[:, None] * (GATES * H), here, units, GATES, H)
        h_in = h
        if recurrent is not None:
            h_in = h * factor
        h_in = h_in.to(w_hh.dtype.element_ty)
        of_h = ()
        for g in tl.static_range(GATES):
            zero = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
            of_h = of_h + (dot(h_in, weights[g], zero, PRECISION),)
        hats_h, _, scale = whole_hats(of_h, 0, SPLIT, units_in, H)
        p_stats = stats
        if stats is not None:
            p_stats = stats + at * PER_TOKEN
            tl.store(p_stats, scale, active)
        if SPLIT < GATES:
            more, _, scale = whole_hats(of_h, SPLIT, GATES, units_in, H)
            hats_h = hats_h + more
            if stats is not None:
                tl.store(p_stats + 1, scale, active)
        if hats is not None:
            store_columns(hats + at[:, None] * (GATES * H), hats_h, here, units, H)
        pre = pre_activations(of_x, hats_h, norms, units, units_in, INPUT, HIDDEN, COLUMNS, H)
        new_h, new_c, saved = stepped(CELL, pre, h, c, masks, state, here)
        if CELL_STATE:  # its h is that of an LSTM which is not normalised
            of_c, mean_c, scale_c = whole_hats((new_c,), 0, 1, units_in, H)
            new_h = read(saved[3], of_c[0], norms, units, units_in, H)
            new_c = held_c(c, new_c, masks, state, here)
            c = tl.where(active[:, None], new_c, c)
            if cells is not None:
                tl.store(cells + state, new_c, here)
            if stats is not None:
                tl.store(p_stats + 1, mean_c, active)
                tl.store(p_stats + 2, scale_c, active)
        new_h = held_h(h, new_h, masks, state, here)
        h = tl.where(active[:, None], new_h, h)
        tl.store(out + state, new_h.to(out.dtype.element_ty), here)
        if gates is not None:
            store_columns(gates + at[:, None] * (COLUMNS * H), saved, here, units, H)
    tl.store(h_n + state_at, h.to(h_n.dtype.element_ty), tile_in)
    if CELL_STATE:
        tl.store(c_n + state_at, c.to(c_n.dtype.element_ty), tile_in)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    d_out,  # [tokens, H] or None
    d_h_n,  # [B, H] or None
    d_c_n,
    d_cells,  # [tokens, H] or None: of c of every step
    w_hh,  # [G * H, H]
    norms,  # rnn_norm_blocks.Norms
    h0,  # [B, H] or None
    c0,
    lengths,
    starts,
    resets,
    out,  # [tokens, H]
    hats,  # [tokens, G * H]
    gates,  # [tokens, COLUMNS, H]
    cells,  # [tokens, H] fp32 or None
    stats,  # [tokens, STATS] fp32
    d_gates,  # [tokens, COLUMNS, H]; column k at PLACE[k]. This and the rest: 0 behind the lengths
    d_read,  # [tokens, H] or None: of gain and bias of N(c)
    hats_c,  # [tokens, H] fp32 or None: N(c) itself
    d_products,  # [tokens, G * H]: of h W_hh'
    h_before,  # [tokens, H]: that h
    d_h0,  # [B, H] or None
    d_c0,
    masks,  # rnn_noise.Masks
    recurrent,  # [B, H] or None
    T,
    B,
    tokens,
    step,
    row,
    d,
    CELL: tl.constexpr,
    HIDDEN: tl.constexpr,
    PLACE: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    SPLIT: tl.constexpr,
    MASKED: tl.constexpr,  # whether masks do anything
    DIRECT: tl.constexpr,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    units = tl.arange(0, BLOCK_UNITS)
    units_in = units < H
    tile_in = rows_in[:, None] & units_in[None, :]
    state_at = rows[:, None] * H + units[None, :]
    length = lengths_of(lengths, rows, rows_in, T)
    square = units_in[:, None] & units_in[None, :]
    weights = ()
    for g in tl.static_range(GATES):
        weights = weights + (tl.load(w_hh + (g * H + units[:, None]) * H + units[None, :], square, 0.0),)
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
        earlier_at = token(earlier, rows, is_step, starts, step, row)[:, None] * H + units[None, :]
        from_step = is_step[:, None] & units_in[None, :]
        from_initial = is_first[:, None] & units_in[None, :]
        state = at[:, None] * H + units[None, :]
        grad = dh
        if d_out is not None:
            grad += tl.load(d_out + state, here, 0.0).to(tl.float32)
        saved = load_columns(gates + at[:, None] * (COLUMNS * H), here, units, COLUMNS, H)
        h_in = load_either(out, earlier_at, from_step, h0, state_at, from_initial)
        multiplied = h_in
        if recurrent is not None:
            multiplied = h_in * tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
        tl.store(h_before + state, multiplied.to(h_before.dtype.element_ty), here)
        p_stats = stats + at * PER_TOKEN
        if CELL_STATE:
            mean_c = tl.load(p_stats + 1, active, 0.0)
            scale_c = tl.load(p_stats + 2, active, 0.0)
            c_in = load_either(cells, earlier_at, from_step, c0, state_at, from_initial)
            if (masks.hold_c is not None) or (masks.share_c is not None):
                made = c_made(saved, c_in, masks, state, here)
            else:
                made = tl.load(cells + state, here, 0.0)
            hat_c = tl.where(here, (made - mean_c[:, None]) * scale_c[:, None], 0.0)
            arrived = carry
            if d_cells is not None:
                arrived += tl.load(d_cells + state, here, 0.0).to(tl.float32)
            grad = tl.where(here, grad, 0.0)
            kept = held_h(grad, tl.zeros_like(grad), masks, state, here)
            grad -= kept
            squashed, d_of_read, d_hat = read_backward(saved[3], hat_c, norms, grad, units, units_in, H)
            plain, by_hat = gradient_sums((d_hat,), (hat_c,), 0, 1)
            of_c = through((d_hat,), (hat_c,), 0, 1, plain, by_hat, H, scale_c, here)
            d_pre, new_carry = lstm_backward(saved, c_in, squashed, grad, arrived, of_c[0], masks, state, here)
            tl.store(d_read + state, d_of_read.to(d_read.dtype.element_ty), here)
            tl.store(hats_c + state, hat_c, here)
        elif not MASKED:
            d_pre, new_carry = CELL(saved, h_in, h_in, grad, carry)
        else:
            d_pre, new_carry, kept = masked_backward(CELL, False, saved, h_in, h_in, grad, carry, masks, state, here)
        if MASKED:
            if resets is not None:
                kept = tl.where(anew[:, None], 0.0, kept)
            dh = tl.where(active[:, None], kept, dh)  # before the products: a tile less to keep meanwhile
        p_grads = d_gates + at[:, None] * (COLUMNS * H) + units[None, :]
        for k in tl.static_range(COLUMNS):
            tl.store(p_grads + PLACE[k] * H, d_pre[k].to(d_gates.dtype.element_ty), here)
        at_gates = at[:, None] * (GATES * H)
        of_h = load_columns(hats + at_gates, here, units, GATES, H)
        d_h = through_gains(d_pre, norms, units, units_in, here, HIDDEN, GATES, COLUMNS, H)
        plain, by_hat = gradient_sums(d_h, of_h, 0, SPLIT)
        to_h = through(d_h, of_h, 0, SPLIT, plain, by_hat, H, tl.load(p_stats, active, 0.0), here)
        if SPLIT < GATES:
            plain, by_hat = gradient_sums(d_h, of_h, SPLIT, GATES)
            scale = tl.load(p_stats + 1, active, 0.0)
            to_h = to_h + through(d_h, of_h, SPLIT, GATES, plain, by_hat, H, scale, here)
        store_columns(d_products + at_gates, to_h, here, units, H)
        new_dh = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        for g in tl.static_range(GATES):
            of_gate = to_h[g].to(d_products.dtype.element_ty)
            if resets is not None:
                of_gate = tl.where(anew[:, None], 0.0, of_gate)
            new_dh = dot(of_gate, weights[g], new_dh, PRECISION)
        if resets is not None:
            new_carry = tl.where(anew[:, None], 0.0, new_carry)
        dh, carry = step_back(dh, new_dh, carry, new_carry, active, recurrent, state_at, tile_in, MASKED)
    store_initial(d_h0, d_c0, dh, carry, state_at, tile_in, DIRECT)
