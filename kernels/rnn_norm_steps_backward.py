"""rnn_norm_steps.py's way back: the phases `pull`, of a cell state `cell`, and `products`, from the last step on.

dL/dh of a tile is what comes from outside, plus the later step's gradients of the products times W_hh. What a
normalisation hands back needs two sums over a row, of which each tile says its own units' part.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import tile_of, wait_for_all, wide, zeros
from .rnn_batch import before, load_either, token
from .rnn_noise import held_h, masked_backward
from .rnn_norm_blocks import (
    PER_TOKEN,
    c_made,
    gradient_sums,
    hats_of,
    load_columns,
    lstm_backward,
    read_backward,
    store_columns,
    through,
    through_gains,
)
from .rnn_norm_steps import PARTS, SIZES, anew_at, at_step, load_parts, store_parts
from .rnn_steps import through_gates

__all__ = ["Back", "Found", "Given", "backward_kernel"]


class Given(NamedTuple):
    """What backward reads."""

    d_out: Any  # [tokens, H] or None
    d_h_n: Any  # [B, H] or None
    d_cells: Any  # [tokens, H] or None: of c of every step
    h0: Any  # [B, H] or None
    c0: Any
    out: Any  # [tokens, H]
    hats: Any  # [tokens, G * H]
    gates: Any  # [tokens, COLUMNS, H]
    cells: Any  # [tokens, H] fp32 or None
    stats: Any  # [tokens, STATS] fp32


class Found(NamedTuple):
    """What backward leaves; of the first five 0 behind the lengths."""

    gates: Any  # [tokens, COLUMNS, H]; column k at PLACE[k]
    read: Any  # [tokens, H] or None: of gain and bias of N(c)
    hat_c: Any  # [tokens, H] fp32 or None: N(c) itself
    products: Any  # [tokens, G * H]: of h W_hh'
    before: Any  # [tokens, H]: that h
    h0: Any  # [B, H] or None


class Back(NamedTuple):
    """Backward's work, in fp32."""

    carry: Any  # [B, H], as the cell has it; at first d_c_n, at last d_c0
    kept: Any  # [B, H], at first 0: what masks keep of dL/dh beside c; otherwise None, and in carry
    dh: Any  # [B, H]: between pull and cell
    d_hats: Any  # [B, G * H]
    parts: Any  # as forward's: `gradient_sums`
    cell_parts: Any
    arrived: Any


@triton.jit
def _sums(parts, BLOCK: tl.constexpr, rows, rows_in, B, Z: tl.constexpr):
    """`gradient_sums` of whole rows."""
    plain = zeros(Z.rows)
    by_hat = zeros(Z.rows)
    across: tl.constexpr = Z.across
    for j0 in tl.static_range(0, across, PARTS):
        first, second, _ = load_parts(parts, BLOCK, j0, rows, rows_in, B, Z)
        plain += tl.sum(first, 1)
        by_hat += tl.sum(second, 1)
    return plain, by_hat


@triton.jit
def _pull(tile, s, w_hh, places, recurrent, given, found, back, sizes, Z: tl.constexpr):
    """A tile of dL/dh at this step, 0 where none is; at step T, which has no token, d_h0 instead."""
    T, B, step, row, d = sizes
    rows, rows_in, units, units_in = tile_of(tile, wide(B), Z.H, Z.rows, Z.units)
    t, length, active, at = at_step(s, d != 0, places, sizes, rows, rows_in)
    later = tl.where(d == 0, t + 1, tl.minimum(t, length) - 1)  # at s = T the row's first step of all
    is_later = (later >= 0) & (later < length)
    later_at = token(later, rows, is_later, places.starts, step, row)
    arrives = is_later & ~anew_at(places, sizes, later, length, is_later, rows)
    dh = through_gates(
        found.products + later_at * (Z.gates * Z.H), arrives, w_hh, units, units_in, Z.EACH, Z.EACH, Z.gates, Z.H,
        Z.rows, Z.units, Z.k, Z.PRECISION,
    )  # fmt: skip
    state_at = rows[:, None] * Z.H + units[None, :]
    tile_in = rows_in[:, None] & units_in[None, :]
    if recurrent is not None:
        dh *= tl.load(recurrent + state_at, tile_in, 0.0).to(tl.float32)
    if back.kept is not None:
        dh += tl.load(back.kept + state_at, tile_in, 0.0)
    if given.d_h_n is not None:
        seeds = (active | (rows_in & (s == T))) & ~is_later
        dh += tl.load(given.d_h_n + state_at, seeds[:, None] & units_in[None, :], 0.0).to(tl.float32)
    if found.h0 is not None:
        if s == T:
            d_initial = dh
            if Z.direct:
                d_initial += tl.load(back.carry + state_at, tile_in, 0.0)
            tl.store(found.h0 + state_at, d_initial.to(found.h0.dtype.element_ty), tile_in)
    here = active[:, None] & units_in[None, :]
    if given.d_out is not None:
        dh += tl.load(given.d_out + at[:, None] * Z.H + units[None, :], here, 0.0).to(tl.float32)
    return tl.where(here, dh, 0.0)


@triton.jit
def _earlier(t, length, active, anew, rows, units, units_in, places, sizes, Z: tl.constexpr):
    """Where the state before step t lies: (places of a step's, whether there, whether at a row's initial one's)."""
    _, _, step, row, d = sizes
    earlier, is_step = before(t, d, length)
    is_first = active & ~is_step & ~anew
    is_step &= active & ~anew
    at = token(earlier, rows, is_step, places.starts, step, row)[:, None] * Z.H + units[None, :]
    return at, is_step[:, None] & units_in[None, :], is_first[:, None] & units_in[None, :]


@triton.jit
def _read_backward(tile, s, dh, norms, places, masks, given, found, back, sizes, Z: tl.constexpr):
    """A tile of the gradients of h's reading c: what its own units come to."""
    rows, rows_in, units, units_in = tile_of(tile, wide(sizes[1]), Z.H, Z.rows, Z.units)
    t, length, active, at = at_step(s, sizes[4] != 0, places, sizes, rows, rows_in)
    here = active[:, None] & units_in[None, :]
    state_at = rows[:, None] * Z.H + units[None, :]
    of_out = at[:, None] * Z.H + units[None, :]
    if Z.masked:
        anew = anew_at(places, sizes, t, length, active, rows)
    if back.kept is not None:
        kept = held_h(dh, tl.zeros_like(dh), masks, of_out, here)
        dh -= kept
        tl.store(back.kept + state_at, tl.where(anew[:, None], 0.0, kept), here)
    p_gates = given.gates + at[:, None] * (Z.columns * Z.H)
    if (masks.hold_c is not None) or (masks.share_c is not None):
        saved = load_columns(p_gates, here, units, Z.columns, Z.H)
        earlier_at, from_step, from_initial = _earlier(
            t, length, active, anew, rows, units, units_in, places, sizes, Z
        )  # fmt: skip
        c_in = load_either(given.cells, earlier_at, from_step, given.c0, state_at, from_initial)
        c = c_made(saved, c_in, masks, of_out, here)
        o = saved[3]
    else:
        c = tl.load(given.cells + of_out, here, 0.0)
        o = tl.load(p_gates + 3 * Z.H + units[None, :], here, 0.0).to(tl.float32)
    mean = tl.load(given.stats + at * PER_TOKEN + 1, active, 0.0)
    scale = tl.load(given.stats + at * PER_TOKEN + 2, active, 0.0)
    hat_c = hats_of((c,), 0, 1, mean, scale, here)[0]
    _, d_read, d_hat = read_backward(o, hat_c, norms, dh, units, units_in, Z.H)
    tl.store(found.read + of_out, d_read.to(found.read.dtype.element_ty), here)
    tl.store(back.dh + state_at, dh, here)
    tl.store(found.hat_c + of_out, hat_c, here)
    both = gradient_sums((d_hat,), (hat_c,), 0, 1)
    store_parts(back.cell_parts, 0, both, tile % Z.across, rows, rows_in, wide(sizes[1]), Z)


@triton.jit
def _cell_backward(
    tile, s, dh, norms, places, masks, recurrent, given, found, back, sizes, Z: tl.constexpr, CELL: tl.constexpr
):
    """A tile of the cell's gradients, and what its own units of the hats' come to."""
    B = wide(sizes[1])
    rows, rows_in, units, units_in = tile_of(tile, B, Z.H, Z.rows, Z.units)
    t, length, active, at = at_step(s, sizes[4] != 0, places, sizes, rows, rows_in)
    here = active[:, None] & units_in[None, :]
    anew = anew_at(places, sizes, t, length, active, rows)
    state_at = rows[:, None] * Z.H + units[None, :]
    of_out = at[:, None] * Z.H + units[None, :]
    earlier_at, from_step, from_initial = _earlier(t, length, active, anew, rows, units, units_in, places, sizes, Z)
    h_in = load_either(given.out, earlier_at, from_step, given.h0, state_at, from_initial)
    multiplied = h_in
    if recurrent is not None:
        multiplied = h_in * tl.load(recurrent + state_at, here, 0.0).to(tl.float32)
    tl.store(found.before + of_out, multiplied.to(found.before.dtype.element_ty), here)
    saved = load_columns(given.gates + at[:, None] * (Z.columns * Z.H), here, units, Z.columns, Z.H)
    carry = tl.load(back.carry + state_at, here, 0.0)
    if Z.cell_state:
        dh = tl.load(back.dh + state_at, here, 0.0)
        hat_c = tl.load(found.hat_c + of_out, here, 0.0)
        scale = tl.load(given.stats + at * PER_TOKEN + 2, active, 0.0)
        squashed, _, d_hat = read_backward(saved[3], hat_c, norms, dh, units, units_in, Z.H)
        plain, by_hat = _sums(back.cell_parts, 0, rows, rows_in, B, Z)
        of_c = through((d_hat,), (hat_c,), 0, 1, plain, by_hat, Z.H, scale, here)
        c_in = load_either(given.cells, earlier_at, from_step, given.c0, state_at, from_initial)
        if given.d_cells is not None:
            carry += tl.load(given.d_cells + of_out, here, 0.0).to(tl.float32)
        d_pre, new_carry = lstm_backward(saved, c_in, squashed, dh, carry, of_c[0], masks, of_out, here)
    elif not Z.masked:
        d_pre, new_carry = CELL(saved, h_in, h_in, dh, carry)
    else:
        d_pre, new_carry, kept = masked_backward(CELL, False, saved, h_in, h_in, dh, carry, masks, of_out, here)
        new_carry += kept
    tl.store(back.carry + state_at, tl.where(anew[:, None], 0.0, new_carry), here)
    p_grads = found.gates + at[:, None] * (Z.columns * Z.H) + units[None, :]
    for k in tl.static_range(len(Z.PLACE)):
        tl.store(p_grads + Z.PLACE[k] * Z.H, d_pre[k].to(found.gates.dtype.element_ty), here)
    d_hats = through_gains(d_pre, norms, units, units_in, here, Z.HIDDEN, Z.gates, Z.columns, Z.H)
    store_columns(back.d_hats + rows[:, None] * (Z.gates * Z.H), d_hats, here, units, Z.H)
    hats = load_columns(given.hats + at[:, None] * (Z.gates * Z.H), here, units, Z.gates, Z.H)
    both = gradient_sums(d_hats, hats, 0, Z.split)
    store_parts(back.parts, 0, both, tile % Z.across, rows, rows_in, B, Z)
    if Z.split < Z.gates:
        both = gradient_sums(d_hats, hats, Z.split, Z.gates)
        store_parts(back.parts, 1, both, tile % Z.across, rows, rows_in, B, Z)


@triton.jit
def _products_backward(tile, s, places, given, found, back, sizes, Z: tl.constexpr):
    """A tile of the gradients of h W_hh'."""
    B = wide(sizes[1])
    rows, rows_in, units, units_in = tile_of(tile, B, Z.H, Z.rows, Z.units)
    _, _, active, at = at_step(s, sizes[4] != 0, places, sizes, rows, rows_in)
    here = active[:, None] & units_in[None, :]
    d_hats = load_columns(back.d_hats + rows[:, None] * (Z.gates * Z.H), here, units, Z.gates, Z.H)
    hats = load_columns(given.hats + at[:, None] * (Z.gates * Z.H), here, units, Z.gates, Z.H)
    plain, by_hat = _sums(back.parts, 0, rows, rows_in, B, Z)
    scale = tl.load(given.stats + at * PER_TOKEN, active, 0.0)
    d = through(d_hats, hats, 0, Z.split, plain, by_hat, Z.H, scale, here)
    if Z.split < Z.gates:
        plain, by_hat = _sums(back.parts, 1, rows, rows_in, B, Z)
        scale = tl.load(given.stats + at * PER_TOKEN + 1, active, 0.0)
        d = d + through(d_hats, hats, Z.split, Z.gates, plain, by_hat, Z.H, scale, here)
    store_columns(found.products + at[:, None] * (Z.gates * Z.H), d, here, units, Z.H)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    w_hh,  # [G * H, H]
    norms,  # rnn_norm_blocks.Norms
    places,  # Places, and so on
    masks,
    recurrent,  # [B, H] or None
    given,
    found,
    back,
    T,
    B,
    step,
    row,
    d,  # 1: in reverse
    s0,  # steps s0 .. s1 - 1, from the rows' ends to their begins, of each the phases p0 .. p1 - 1
    s1,
    p0,
    p1,
    CELL: tl.constexpr,
    Z: tl.constexpr,
    BARRIER: tl.constexpr,  # without, no phase may follow another in the launch
):
    sizes = (T, B, step, row, d)
    phases: tl.constexpr = Z.phases
    arrived = 0
    tiles = tl.cdiv(B, Z.rows) * Z.across
    for s in range(s0, s1):
        for p in tl.static_range(phases):
            if (p >= p0) & (p < p1):
                for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
                    if p == 0:
                        dh = _pull(tile, s, w_hh, places, recurrent, given, found, back, sizes, Z)
                        if Z.cell_state:
                            _read_backward(tile, s, dh, norms, places, masks, given, found, back, sizes, Z)
                        else:
                            _cell_backward(
                                tile, s, dh, norms, places, masks, recurrent, given, found, back, sizes, Z, CELL
                            )
                    elif p + 1 == Z.phases:
                        _products_backward(tile, s, places, given, found, back, sizes, Z)
                    else:
                        _cell_backward(
                            tile, s, None, norms, places, masks, recurrent, given, found, back, sizes, Z, CELL
                        )
                if BARRIER:
                    if (s + 1 < s1) | (p + 1 < p1):  # after the last the kernel ends
                        arrived += tl.num_programs(0)
                        wait_for_all(back.arrived, arrived)
