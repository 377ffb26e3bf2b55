"""A layer-normalised recurrence on a grid of programs, each with some tiles (block of rows x block of units).

For any size. A row's statistics are of all its units, so of several programs: each says what its own units come to,
all wait, and each joins what all said of its rows, in the same order. A step is a row of phases with a wait behind
each, as a decoder's (decoder_forward.py): forward `products`, `cell` and of a cell state `read`, backward `pull`, of a
cell state `cell`, and `products`. What goes from step to step and from phase to phase is `Work`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import product, tile_of, wait_for_all, wide, zeros
from .launch import cdiv
from .rnn_batch import lengths_of, starts_anew, token
from .rnn_noise import held_c, held_h, stepped
from .rnn_norm_blocks import (
    EPS,
    PER_TOKEN,
    hats_of,
    joined,
    load_columns,
    pre_activations,
    read,
    spread,
    store_columns,
)

__all__ = [
    "PARTS", "SIZES", "Kept", "Places", "Static", "Work", "anew_at", "at_step", "forward_kernel", "load_parts",
    "store_parts",
]  # fmt: skip

SIZES = ["T", "B", "step", "row", "d", "s0", "s1", "p0", "p1"]
PARTS = tl.constexpr(64)  # that are joined at once


@dataclass(frozen=True)
class Static:
    """What a kernel is compiled for."""

    input_gates: tuple[int, ...]  # INPUT, HIDDEN and PLACE of `cells.Cell`
    hidden_gates: tuple[int, ...]
    places: tuple[int, ...]
    gates: int
    columns: int
    cell_state: bool
    direct: bool
    masked: bool  # whether masks do anything
    split: int  # gates of the first block of statistics
    H: int
    rows: int  # of a tile
    units: int
    k: int
    dot: str  # as in `launch.precision`

    @property
    def phases(self) -> int:
        """Of a step, either way."""
        return 3 if self.cell_state else 2

    @property
    def across(self) -> int:
        """Tiles that share a row."""
        return cdiv(self.H, self.units)

    @property
    def PRECISION(self) -> tl.constexpr:
        return tl.constexpr(self.dot)

    @property
    def INPUT(self) -> tl.tuple:
        return _constants(self.input_gates)

    @property
    def HIDDEN(self) -> tl.tuple:
        return _constants(self.hidden_gates)

    @property
    def PLACE(self) -> tl.tuple:
        return _constants(self.places)

    @property
    def EACH(self) -> tl.tuple:
        """All gates of W_hh, in order."""
        return _constants(range(self.gates))


def _constants(numbers: Iterable[int]) -> tl.tuple:
    return tl.tuple([*map(tl.constexpr, numbers)])


class Places(NamedTuple):
    lengths: Any  # [B] or None
    starts: Any  # [T] or None
    resets: Any  # [tokens] uint8 or None


class Kept(NamedTuple):
    """What forward leaves; without `save` only the first two, and cells where they are asked for."""

    out: Any  # [tokens, H], 0 behind the lengths
    h_n: Any  # [B, H]: at first the initial state, which a row of length 0 keeps
    hats: Any  # [tokens, G * H]
    gates: Any  # [tokens, COLUMNS, H]
    cells: Any  # [tokens, H] fp32
    stats: Any  # [tokens, STATS] fp32


class Work(NamedTuple):
    """Forward's; fp32 but for `handed`."""

    handed: Any  # [B, H]: h, as W_hh multiplies it; at first the initial one, which a row keeps until it begins
    carry: Any  # [B, H]: c of a cell with a cell state, otherwise h; at first the initial one
    h_carry: Any  # the same of h beside c, where masks keep some of it; otherwise None
    made: Any  # [B, H]: c' as the cell made it, between cell and read, where masks keep some of c; otherwise None
    opened: Any  # [B, H]: the output gate, between cell and read
    products: Any  # [B, G * H]: h W_hh'
    parts: Any  # [blocks of statistics, 2, B, blocks of units]: means, squares around them
    cell_parts: Any  # [2, B, blocks of units]: those of c
    arrived: Any  # int32, 0; None without BARRIER


@triton.jit
def at_step(s, ascends, places, sizes, rows, rows_in):
    """For each row: its step and its length, whether it is within, where its token lies. ascends: step s, not T-1-s."""
    T, _, step, row, _ = sizes
    length = lengths_of(places.lengths, rows, rows_in, T)
    t = tl.where(ascends, s, T - 1 - s) + tl.zeros_like(length)
    active = (t >= 0) & (t < length)
    return t, length, active, token(t, rows, active, places.starts, step, row)


@triton.jit
def anew_at(places, sizes, t, length, there, rows):
    """Which rows start from zeros at step t."""
    _, _, step, row, d = sizes
    anew = there & False
    if places.resets is not None:
        anew = starts_anew(places.resets, t, d, length, there, rows, places.starts, step, row)
    return anew


@triton.jit
def _units_of(block, Z: tl.constexpr):
    """How many units a block of them has, as fp32."""
    return tl.minimum(Z.H - wide(block) * Z.units, Z.units).to(tl.float32)


@triton.jit
def store_parts(parts, BLOCK: tl.constexpr, both, block, rows, rows_in, B, Z: tl.constexpr):
    """Two numbers of each row, of one block of units."""
    p = parts + (2 * BLOCK * B + rows) * Z.across + block
    tl.store(p, both[0], rows_in)
    tl.store(p + B * Z.across, both[1], rows_in)


@triton.jit
def load_parts(parts, BLOCK: tl.constexpr, j0: tl.constexpr, rows, rows_in, B, Z: tl.constexpr):
    """(both numbers [rows, parts], units of each part) of the blocks of units from j0 on. Other programs wrote them."""
    some: tl.constexpr = min(PARTS, triton.next_power_of_2(Z.across))
    j = j0 + tl.arange(0, some)
    there = rows_in[:, None] & (j < Z.across)[None, :]
    p = parts + (2 * BLOCK * B + rows)[:, None] * Z.across + j[None, :]
    first = tl.load(p, there, 0.0, cache_modifier=".cg")
    second = tl.load(p + B * Z.across, there, 0.0, cache_modifier=".cg")
    return first, second, tl.maximum(tl.minimum(Z.H - j * Z.units, Z.units), 0).to(tl.float32)


@triton.jit
def _statistics(parts, BLOCK: tl.constexpr, GATES: tl.constexpr, rows, rows_in, B, Z: tl.constexpr):
    """(mean, 1 / deviation) [rows] of a block of statistics of GATES gates."""
    count = zeros(Z.rows)
    mean = zeros(Z.rows)
    squares = zeros(Z.rows)
    across: tl.constexpr = Z.across
    for j0 in tl.static_range(0, across, PARTS):
        means, own, units = load_parts(parts, BLOCK, j0, rows, rows_in, B, Z)
        counts = GATES * units
        more = tl.sum(counts, 0)
        joint = tl.sum(means * counts[None, :], 1) / more
        off = means - joint[:, None]
        own += off * off * counts[None, :]
        count, mean, squares = joined(count, mean, squares, more, joint, tl.sum(own, 1))
    return mean, 1 / tl.sqrt(squares / (GATES * Z.H) + EPS)


@triton.jit
def _products(tile, s, w_hh, places, work, sizes, Z: tl.constexpr):
    """A tile of h W_hh', and what its own units come to."""
    B = wide(sizes[1])
    rows, rows_in, units, units_in = tile_of(tile, B, Z.H, Z.rows, Z.units)
    t, length, active, _ = at_step(s, sizes[4] == 0, places, sizes, rows, rows_in)
    goes_on = active & ~anew_at(places, sizes, t, length, active, rows)
    H: tl.constexpr = Z.H
    accs = ()
    for _g in tl.static_range(len(Z.EACH)):
        accs = accs + (zeros(Z.rows, Z.units),)
    of_h = product(accs, Z.EACH, work.handed, H, rows, goes_on, w_hh, H, 1, units, units_in, H, H, Z.k, Z.PRECISION)
    tile_in = rows_in[:, None] & units_in[None, :]
    store_columns(work.products + rows[:, None] * (Z.gates * Z.H), of_h, tile_in, units, Z.H)
    block = tile % Z.across
    count = _units_of(block, Z)
    both = spread(of_h, 0, Z.split, units_in, Z.split * count)
    store_parts(work.parts, 0, both, block, rows, rows_in, B, Z)
    if Z.split < Z.gates:
        both = spread(of_h, Z.split, Z.gates, units_in, (Z.gates - Z.split) * count)
        store_parts(work.parts, 1, both, block, rows, rows_in, B, Z)


@triton.jit
def _cell(tile, s, hats_x, norms, places, masks, recurrent, work, kept, sizes, Z: tl.constexpr, CELL: tl.constexpr):
    """A tile of the cell: a GRU's h, of an LSTM all but what reads c."""
    B = wide(sizes[1])
    rows, rows_in, units, units_in = tile_of(tile, B, Z.H, Z.rows, Z.units)
    t, length, active, at = at_step(s, sizes[4] == 0, places, sizes, rows, rows_in)
    here = active[:, None] & units_in[None, :]
    block = tile % Z.across
    own = active & (block == 0)  # one tile of a row's says its statistics
    of_h = load_columns(work.products + rows[:, None] * (Z.gates * Z.H), here, units, Z.gates, Z.H)
    mean, scale = _statistics(work.parts, 0, Z.split, rows, rows_in, B, Z)
    hats = hats_of(of_h, 0, Z.split, mean, scale, here)
    if kept.stats is not None:
        tl.store(kept.stats + at * PER_TOKEN, scale, own)
    if Z.split < Z.gates:
        mean, scale = _statistics(work.parts, 1, Z.gates - Z.split, rows, rows_in, B, Z)
        hats = hats + hats_of(of_h, Z.split, Z.gates, mean, scale, here)
        if kept.stats is not None:
            tl.store(kept.stats + at * PER_TOKEN + 1, scale, own)
    p_inputs = hats_x + at[:, None] * (Z.gates * Z.H)
    of_x = load_columns(p_inputs, here, units, Z.gates, Z.H)
    pre = pre_activations(of_x, hats, norms, units, units_in, Z.INPUT, Z.HIDDEN, Z.columns, Z.H)
    goes_on = active & ~anew_at(places, sizes, t, length, active, rows)
    state_at = rows[:, None] * Z.H + units[None, :]
    state = tl.load(work.carry + state_at, goes_on[:, None] & units_in[None, :], 0.0)
    of_out = at[:, None] * Z.H + units[None, :]
    new_h, new_c, saved = stepped(CELL, pre, state, state, masks, of_out, here)
    if kept.hats is not None:
        store_columns(kept.hats + at[:, None] * (Z.gates * Z.H), hats, here, units, Z.H)
        store_columns(kept.gates + at[:, None] * (Z.columns * Z.H), saved, here, units, Z.H)
    if Z.cell_state:
        tl.store(work.opened + state_at, saved[3], here)
        both = spread((new_c,), 0, 1, units_in, _units_of(block, Z))
        store_parts(work.cell_parts, 0, both, block, rows, rows_in, B, Z)
        if work.made is not None:
            tl.store(work.made + state_at, new_c, here)
        new_c = held_c(state, new_c, masks, of_out, here)
        tl.store(work.carry + state_at, new_c, here)
        if kept.cells is not None:
            tl.store(kept.cells + of_out, new_c, here)
    else:
        new_h = held_h(state, new_h, masks, of_out, here)
        tl.store(work.carry + state_at, new_h, here)
        _hand_on(new_h, recurrent, work, kept, sizes, t, length, active, at, state_at, units, units_in, Z)


@triton.jit
def _read(tile, s, norms, places, masks, recurrent, work, kept, sizes, Z: tl.constexpr):
    """A tile of an LSTM's h, of c normalised."""
    B = wide(sizes[1])
    rows, rows_in, units, units_in = tile_of(tile, B, Z.H, Z.rows, Z.units)
    t, length, active, at = at_step(s, sizes[4] == 0, places, sizes, rows, rows_in)
    here = active[:, None] & units_in[None, :]
    state_at = rows[:, None] * Z.H + units[None, :]
    mean, scale = _statistics(work.cell_parts, 0, 1, rows, rows_in, B, Z)
    made = work.carry
    if work.made is not None:
        made = work.made
    c = tl.load(made + state_at, here, 0.0)
    hats = hats_of((c,), 0, 1, mean, scale, here)
    o = tl.load(work.opened + state_at, here, 0.0)
    new_h = read(o, hats[0], norms, units, units_in, Z.H)
    if work.h_carry is not None:
        goes_on = active & ~anew_at(places, sizes, t, length, active, rows)
        h = tl.load(work.h_carry + state_at, goes_on[:, None] & units_in[None, :], 0.0)
        new_h = held_h(h, new_h, masks, at[:, None] * Z.H + units[None, :], here)
        tl.store(work.h_carry + state_at, new_h, here)
    _hand_on(new_h, recurrent, work, kept, sizes, t, length, active, at, state_at, units, units_in, Z)
    if kept.stats is not None:
        own = active & (tile % Z.across == 0)
        tl.store(kept.stats + at * PER_TOKEN + 1, mean, own)
        tl.store(kept.stats + at * PER_TOKEN + 2, scale, own)


@triton.jit
def _hand_on(new_h, recurrent, work, kept, sizes, t, length, active, at, state_at, units, units_in, Z: tl.constexpr):
    """A tile of h to where others read it."""
    here = active[:, None] & units_in[None, :]
    handed = new_h
    if recurrent is not None:
        handed = new_h * tl.load(recurrent + state_at, here, 0.0).to(tl.float32)
    tl.store(work.handed + state_at, handed.to(work.handed.dtype.element_ty), here)
    tl.store(kept.out + at[:, None] * Z.H + units[None, :], new_h.to(kept.out.dtype.element_ty), here)
    ends = tl.where(sizes[4] == 0, t == length - 1, t == 0) & active
    tl.store(kept.h_n + state_at, new_h.to(kept.h_n.dtype.element_ty), ends[:, None] & units_in[None, :])


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    hats_x,  # [tokens, G * H]: N of x W_ih'
    w_hh,  # [G * H, H]
    norms,  # rnn_norm_blocks.Norms
    places,  # Places, and so on
    masks,
    recurrent,  # [B, H] or None: multiplies h on its way into W_hh
    work,
    kept,
    T,
    B,
    step,
    row,
    d,  # 1: in reverse
    s0,  # steps s0 .. s1 - 1, of each the phases p0 .. p1 - 1
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
                        _products(tile, s, w_hh, places, work, sizes, Z)
                    elif p == 1:
                        _cell(tile, s, hats_x, norms, places, masks, recurrent, work, kept, sizes, Z, CELL)
                    else:
                        _read(tile, s, norms, places, masks, recurrent, work, kept, sizes, Z)
                if BARRIER:
                    if (s + 1 < s1) | (p + 1 < p1):  # after the last the kernel ends
                        arrived += tl.num_programs(0)
                        wait_for_all(work.arrived, arrived)
