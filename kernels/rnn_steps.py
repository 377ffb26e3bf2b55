"""A layer's recurrence on a grid of programs, each with some tiles (direction x block of rows x block of units).

For any size. The steps' h goes through global memory, past the first-level caches: `exchange` holds that of the last
step and of this one, in the weights' dtype. With BARRIER the whole grid is resident and waits after each step, so one
launch runs all of them; without, a launch runs one. Each tile keeps its fp32 state in `carry`, which no other reads.
"""

import triton
import triton.language as tl

from .blocks import dot, product, spanning, wait_for_all
from .rnn_batch import before, bias_rows, lengths_of, load_either, starts_anew, token
from .rnn_noise import masked, masked_backward

__all__ = ["backward_kernel", "forward_kernel", "through_gates"]

_SIZES = ["T", "B", "tokens", "step", "row", "first", "end"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    inputs,  # [D, tokens, G * H]: x W_ih'
    w_hh,  # [G * H, H]
    w_hh_reverse,  # of direction 1, or None
    b_ih,  # [G * H] or None
    b_ih_reverse,
    b_hh,
    b_hh_reverse,
    lengths,  # [B] or None
    starts,  # [T] or None
    resets,  # [tokens] uint8 or None: not 0 where a segment begins
    exchange,  # [2, D, B, H]: h before step s at s % 2, as W_hh multiplies it; at 0 the initial one
    carry,  # [D, B, H] fp32: c of a cell with a cell state, otherwise h; at first the initial one
    h_carry,  # the same of h beside c, where masks keep some of it; otherwise None
    out,  # [tokens, D, H], 0 behind the lengths
    h_n,  # [D, B, H]: at first the initial state, which a row of length 0 keeps
    gates,  # [D, tokens, COLUMNS, H] or None
    cells,  # [D, tokens, H] fp32 or None
    masks,  # rnn_noise.Masks if MASKED
    recurrent,  # [D, B, H] or None: multiplies h on its way into W_hh
    counter,  # int32, 0; None without BARRIER
    T,
    B,
    tokens,
    step,
    row,
    first,  # steps s of first .. end - 1
    end,
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
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BARRIER: tl.constexpr,
):
    programs = tl.num_programs(0)
    unit_blocks: tl.constexpr = (H + BLOCK_UNITS - 1) // BLOCK_UNITS
    row_blocks = tl.cdiv(B, BLOCK_ROWS)
    for s in range(first, end):
        for tile in range(tl.program_id(0), DIRECTIONS * row_blocks * unit_blocks, programs):
            units = tile % unit_blocks * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
            units_in = units < H
            block = tile // unit_blocks
            d = (block // row_blocks).to(tl.int64)
            rows = (block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            rows_in = rows < B
            tile_in = rows_in[:, None] & units_in[None, :]
            state_at = (d * B + rows)[:, None] * H + units[None, :]
            length = lengths_of(lengths, rows, rows_in, T)
            t = tl.where(d == 0, s, T - 1 - s) + tl.zeros_like(length)
            active = t < length
            here = active[:, None] & units_in[None, :]
            at = token(t, rows, active, starts, step, row)
            w = w_hh
            if DIRECTIONS == 2:
                if d == 1:
                    w = w_hh_reverse
            biases = bias_rows(
                b_ih, b_ih_reverse, b_hh, b_hh_reverse, d, units, units_in, INPUT, HIDDEN, COLUMNS, DIRECTIONS, H
            )  # fmt: skip
            p_input = inputs + (d * tokens + at)[:, None] * (GATES * H) + units[None, :]
            pre = ()
            for k in tl.static_range(COLUMNS):
                column = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32) + biases[k][None, :]
                if INPUT[k] >= 0:
                    column += tl.load(p_input + INPUT[k] * H, here, 0.0).to(tl.float32)
                pre = pre + (column,)
            size = B.to(tl.int64) * DIRECTIONS * H
            p_last = exchange + s % 2 * size
            goes_on = rows_in
            if resets is not None:
                goes_on = rows_in & ~starts_anew(resets, t, d, length, active, rows, starts, step, row)
            pre = product(
                pre, HIDDEN, p_last + d * B * H, H, rows, goes_on, w, H, 1, units, units_in, H, H, BLOCK_K, PRECISION
            )
            kept = tl.load(carry + state_at, goes_on[:, None] & units_in[None, :], 0.0)
            if not MASKED:
                new_h, new_c, saved = CELL(pre, kept, kept)
            else:
                h = kept
                if h_carry is not None:
                    h = tl.load(h_carry + state_at, goes_on[:, None] & units_in[None, :], 0.0)
                own = (at * DIRECTIONS + d)[:, None] * H + units[None, :]
                new_h, new_c, saved = masked(CELL, pre, h, kept, masks, own, here)
                if h_carry is not None:
                    tl.store(h_carry + state_at, new_h, here)
            if CELL_STATE:
                tl.store(carry + state_at, new_c, here)
                if cells is not None:
                    tl.store(cells + (d * tokens + at)[:, None] * H + units[None, :], new_c, here)
            else:
                tl.store(carry + state_at, new_h, here)
            if CELL_STATE or (recurrent is not None):
                kept = tl.load(p_last + state_at, tile_in, 0.0, cache_modifier=".cg").to(tl.float32)
            handed = new_h
            if recurrent is not None:
                handed = new_h * tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
            held = tl.where(active[:, None], handed, kept)
            tl.store(exchange + (s + 1) % 2 * size + state_at, held.to(exchange.dtype.element_ty), tile_in)
            p_out = out + (at * DIRECTIONS + d)[:, None] * H + units[None, :]
            tl.store(p_out, new_h.to(out.dtype.element_ty), here)
            ends = tl.where(d == 0, t == length - 1, t == 0) & active
            tl.store(h_n + state_at, new_h.to(h_n.dtype.element_ty), ends[:, None] & units_in[None, :])
            if gates is not None:
                p_gates = gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
                for k in tl.static_range(COLUMNS):
                    tl.store(p_gates + k * H, saved[k].to(gates.dtype.element_ty), here)
        if BARRIER:
            wait_for_all(counter, (s + 1 - first) * programs)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    d_out,  # [tokens, D, H] or None
    d_h_n,  # [D, B, H] or None
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
    carry,  # [D, B, H] fp32, as the cell has it; at first d_c_n, at last d_c0
    dh_kept,  # [D, B, H] fp32, at first 0: what masks keep of dL/dh beside c; otherwise None, and in carry
    d_h0,  # [D, B, H] or None: step T, which has no token, gives it
    masks,  # rnn_noise.Masks if MASKED
    recurrent,  # [D, B, H] or None: multiplies h on its way into W_hh
    counter,  # int32, 0; None without BARRIER
    T,
    B,
    tokens,
    step,
    row,
    first,  # steps s of first .. end - 1, from the rows' ends to their begins
    end,
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
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BARRIER: tl.constexpr,
):
    programs = tl.num_programs(0)
    unit_blocks: tl.constexpr = (H + BLOCK_UNITS - 1) // BLOCK_UNITS
    row_blocks = tl.cdiv(B, BLOCK_ROWS)
    for s in range(first, end):
        for tile in range(tl.program_id(0), DIRECTIONS * row_blocks * unit_blocks, programs):
            units = tile % unit_blocks * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
            units_in = units < H
            block = tile // unit_blocks
            d = (block // row_blocks).to(tl.int64)
            rows = (block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            rows_in = rows < B
            state_at = (d * B + rows)[:, None] * H + units[None, :]
            length = lengths_of(lengths, rows, rows_in, T)
            t = tl.where(d == 0, T - 1 - s, s) + tl.zeros_like(length)
            active = (t >= 0) & (t < length)
            here = active[:, None] & units_in[None, :]
            at = token(t, rows, active, starts, step, row)
            later = tl.where(d == 0, t + 1, tl.minimum(t, length) - 1)  # at s = T the row's first step of all
            is_later = (later >= 0) & (later < length)
            later_at = token(later, rows, is_later, starts, step, row)
            arrives = is_later
            if resets is not None:
                arrives = is_later & ~starts_anew(resets, later, d, length, is_later, rows, starts, step, row)
            w = w_hh
            if DIRECTIONS == 2:
                if d == 1:
                    w = w_hh_reverse
            dh = through_gates(
                d_gates + (d * tokens + later_at) * (COLUMNS * H), arrives, w, units, units_in, HIDDEN, PLACE, COLUMNS,
                H, BLOCK_ROWS, BLOCK_UNITS, BLOCK_K, PRECISION,
            )  # fmt: skip
            tile_in = rows_in[:, None] & units_in[None, :]
            if recurrent is not None:
                factor = tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
                dh *= factor
            if dh_kept is not None:
                dh += tl.load(dh_kept + state_at, tile_in, 0.0)
            if d_h_n is not None:
                seeds = (active | (rows_in & (s == T))) & ~is_later
                dh += tl.load(d_h_n + state_at, seeds[:, None] & units_in[None, :], 0.0).to(tl.float32)
            kept = tl.load(carry + state_at, tile_in, 0.0)
            if d_h0 is not None:
                if s == T:
                    d_initial = dh + kept if DIRECT else dh
                    tl.store(d_h0 + state_at, d_initial.to(d_h0.dtype.element_ty), tile_in)
            if d_out is not None:
                p_out = d_out + (at * DIRECTIONS + d)[:, None] * H + units[None, :]
                dh += tl.load(p_out, here, 0.0).to(tl.float32)
            p_gates = gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
            saved = ()
            for k in tl.static_range(COLUMNS):
                saved = saved + (tl.load(p_gates + k * H, here, 0.0).to(tl.float32),)
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
            if (not CELL_STATE) or (h_before is not None):
                out_at = (earlier_at * DIRECTIONS + d)[:, None] * H + units[None, :]
                h_in = load_either(out, out_at, from_step, h0, state_at, from_initial)
                if h_before is not None:
                    p_before = h_before + (d * tokens + at)[:, None] * H + units[None, :]
                    multiplied = h_in
                    if recurrent is not None:
                        multiplied = h_in * factor
                    tl.store(p_before, multiplied.to(h_before.dtype.element_ty), here)
            if CELL_STATE:
                after = tl.load(cells + (d * tokens + at)[:, None] * H + units[None, :], here, 0.0)
                cell_at = (d * tokens + earlier_at)[:, None] * H + units[None, :]
                state_in = load_either(cells, cell_at, from_step, c0, state_at, from_initial)
                if d_cells is not None:
                    kept += tl.load(d_cells + (d * tokens + at)[:, None] * H + units[None, :], here, 0.0)
            else:
                after = h_in
                state_in = h_in
            if not MASKED:
                d_pre, new_carry = CELL(saved, state_in, after, dh, kept)
            else:
                own = (at * DIRECTIONS + d)[:, None] * H + units[None, :]
                d_pre, new_carry, held = masked_backward(
                    CELL, CELL_STATE, saved, state_in, after, dh, kept, masks, own, here
                )
                if not CELL_STATE:
                    new_carry += held
                if dh_kept is not None:
                    if resets is not None:
                        held = tl.where(anew[:, None], 0.0, held)
                    tl.store(dh_kept + state_at, held, here)
            if resets is not None:
                new_carry = tl.where(anew[:, None], 0.0, new_carry)
            tl.store(carry + state_at, new_carry, here)
            p_grads = d_gates + (d * tokens + at)[:, None] * (COLUMNS * H) + units[None, :]
            for k in tl.static_range(COLUMNS):
                tl.store(p_grads + PLACE[k] * H, d_pre[k].to(d_gates.dtype.element_ty), here)
        if BARRIER:
            wait_for_all(counter, (s + 1 - first) * programs)


@triton.jit
def through_gates(
    p_rows,  # [rows]: where a row's d_gates [COLUMNS, H] lie
    rows_in,
    w,  # [G * H, H]
    units,
    units_in,
    HIDDEN: tl.constexpr,
    PLACE: tl.constexpr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_gates W_hh for these rows and units, fp32. Other programs of this launch wrote d_gates."""
    dh = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for column in tl.static_range(COLUMNS):
        if HIDDEN[column] >= 0:
            for k0 in range(0, H, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k_in = k < H
                row = spanning(HIDDEN[column] * H + k[:, None], 4 * H * H)
                part = tl.load(
                    p_rows[:, None] + PLACE[column] * H + k[None, :], rows_in[:, None] & k_in[None, :], 0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                of_gate = tl.load(w + row * H + units[None, :], k_in[:, None] & units_in[None, :], 0.0)
                dh = dot(part, of_gate, dh, PRECISION)
    return dh
