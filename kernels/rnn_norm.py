"""A layer-normalised recurrence in one program a block of rows: W_hh stays on chip for the whole time loop.

For sizes whose W_hh one program can hold, as rnn_sequence.py; which those are says configs.json. A program's tiles hold
whole rows, of which statistics are. One direction a launch; the operator is fastseq/ops/rnn_norm.py, the equations
stand in backends/reference.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.ops.rnn_gpu import Batch, aligned, without_autocast
from fastseq.ops.rnn_norm import GIVEN, STATS, Given, norm_gradients, norm_outputs, spread_sums

from . import devices
from .blocks import dot, tanh
from .cells import CELLS
from .configs import choose, find
from .launch import INTERPRETED, Launch, cdiv, device_of, precision, run, tf32_allowed
from .rnn_batch import before, lengths_of, load_either, starts_anew, token

__all__ = ["backward", "forward", "without_room"]

_SIZES = ["T", "B", "tokens", "step", "row", "d"]
_EPS = tl.constexpr(1e-5)
_STATS = tl.constexpr(STATS)


@triton.jit
def block_hats(columns, FIRST: tl.constexpr, END: tl.constexpr, units_in, H: tl.constexpr):
    """(N of columns[FIRST:END] together, 1 / deviation [rows]); columns are 0 where there is no unit."""
    total = tl.sum(columns[FIRST], 1)
    for g in tl.static_range(FIRST + 1, END):
        total += tl.sum(columns[g], 1)
    mean = total / ((END - FIRST) * H)
    squares = tl.zeros_like(mean)
    for g in tl.static_range(FIRST, END):
        off = tl.where(units_in[None, :], columns[g] - mean[:, None], 0.0)
        squares += tl.sum(off * off, 1)
    scale = 1 / tl.sqrt(squares / ((END - FIRST) * H) + _EPS)
    hats = ()
    for g in tl.static_range(FIRST, END):
        hats = hats + (tl.where(units_in[None, :], (columns[g] - mean[:, None]) * scale[:, None], 0.0),)
    return hats, scale


@triton.jit
def block_gradients(d_hats, hats, scale, FIRST: tl.constexpr, END: tl.constexpr, units_in, H: tl.constexpr):
    """Gradients of what `block_hats` took, from those of the hats."""
    plain = tl.sum(d_hats[FIRST], 1)
    by_hat = tl.sum(d_hats[FIRST] * hats[FIRST], 1)
    for g in tl.static_range(FIRST + 1, END):
        plain += tl.sum(d_hats[g], 1)
        by_hat += tl.sum(d_hats[g] * hats[g], 1)
    plain = plain / ((END - FIRST) * H)
    by_hat = by_hat / ((END - FIRST) * H)
    found = ()
    for g in tl.static_range(FIRST, END):
        d = (d_hats[g] - plain[:, None] - hats[g] * by_hat[:, None]) * scale[:, None]
        found = found + (tl.where(units_in[None, :], d, 0.0),)
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


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    inputs,  # [tokens, G * H]: x W_ih'; becomes N of it where gates are saved
    w_hh,  # [G * H, H]
    gain_x,  # [G * H]
    bias_x,  # [G * H] or None
    gain,
    bias,
    cell_gain,  # [H] or None
    cell_bias,
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
    h = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if h0 is not None:
        h = tl.load(h0 + state_at, tile_in, 0.0).to(tl.float32)
    c = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if c0 is not None:
        c = tl.load(c0 + state_at, tile_in, 0.0).to(tl.float32)
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
        p_inputs = inputs + at[:, None] * (GATES * H)
        of_x = load_columns(p_inputs, here, units, GATES, H)
        of_h = ()
        for g in tl.static_range(GATES):
            zero = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
            of_h = of_h + (dot(h.to(w_hh.dtype.element_ty), weights[g], zero, PRECISION),)
        hats_x, scale_x = block_hats(of_x, 0, SPLIT, units_in, H)
        hats_h, scale_h = block_hats(of_h, 0, SPLIT, units_in, H)
        p_stats = stats
        if stats is not None:
            p_stats = stats + at * _STATS
            tl.store(p_stats, scale_h, active)
            tl.store(p_stats + 3, scale_x, active)
        if SPLIT < GATES:
            more_x, scale_x = block_hats(of_x, SPLIT, GATES, units_in, H)
            more_h, scale_h = block_hats(of_h, SPLIT, GATES, units_in, H)
            hats_x = hats_x + more_x
            hats_h = hats_h + more_h
            if stats is not None:
                tl.store(p_stats + 1, scale_h, active)
                tl.store(p_stats + 4, scale_x, active)
        if hats is not None:
            store_columns(p_inputs, hats_x, here, units, H)
            store_columns(hats + at[:, None] * (GATES * H), hats_h, here, units, H)
        pre = ()
        for k in tl.static_range(COLUMNS):
            column = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
            if INPUT[k] >= 0:
                column += hats_x[INPUT[k]] * load_row(gain_x, INPUT[k], units, units_in, H)
                column += load_row(bias_x, INPUT[k], units, units_in, H)
            if HIDDEN[k] >= 0:
                column += hats_h[HIDDEN[k]] * load_row(gain, HIDDEN[k], units, units_in, H)
                column += load_row(bias, HIDDEN[k], units, units_in, H)
            pre = pre + (column,)
        new_h, new_c, saved = CELL(pre, h, c)
        if CELL_STATE:  # its h is that of an LSTM which is not normalised
            of_c, scale_c = block_hats((new_c,), 0, 1, units_in, H)
            read = of_c[0] * load_row(cell_gain, 0, units, units_in, H) + load_row(cell_bias, 0, units, units_in, H)
            new_h = saved[3] * tanh(read)
            c = tl.where(active[:, None], new_c, c)
            if cells is not None:
                tl.store(cells + at[:, None] * H + units[None, :], new_c, here)
                tl.store(p_stats + 1, tl.sum(new_c, 1) / H, active)
                tl.store(p_stats + 2, scale_c, active)
        h = tl.where(active[:, None], new_h, h)
        tl.store(out + at[:, None] * H + units[None, :], new_h.to(out.dtype.element_ty), here)
        if gates is not None:
            store_columns(gates + at[:, None] * (COLUMNS * H), saved, here, units, H)
    tl.store(h_n + state_at, h.to(h_n.dtype.element_ty), tile_in)
    if CELL_STATE:
        tl.store(c_n + state_at, c.to(c_n.dtype.element_ty), tile_in)


@triton.jit
def lstm_backward(saved, before, hat_c, scale_c, gain, bias, dh, carry, units_in, H: tl.constexpr):
    """(gradients of the columns, dL/dc, dL/d(hat_c gain + bias)) of an LSTM that reads c normalised."""
    i, f, g, o = saved
    squashed = tanh(hat_c * gain + bias)
    d_read = dh * o * (1 - squashed * squashed)
    through = block_gradients((d_read * gain,), (hat_c,), scale_c, 0, 1, units_in, H)
    dc = carry + through[0]
    return (
        dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)
    ), dc * f, d_read  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    d_out,  # [tokens, H] or None
    d_h_n,  # [B, H] or None
    d_c_n,
    w_hh,  # [G * H, H]
    gain_x,  # [G * H]
    gain,
    cell_gain,  # [H] or None
    cell_bias,
    h0,  # [B, H] or None
    c0,
    lengths,
    starts,
    resets,
    out,  # [tokens, H]
    hats_x,  # [tokens, G * H]
    hats,
    gates,  # [tokens, COLUMNS, H]
    cells,  # [tokens, H] fp32 or None
    stats,  # [tokens, STATS] fp32
    d_gates,  # [tokens, COLUMNS, H]; column k at PLACE[k]. This and the rest: 0 behind the lengths
    d_read,  # [tokens, H] or None: of gain and bias of N(c)
    d_inputs,  # [tokens, G * H]: of x W_ih'
    d_products,  # [tokens, G * H]: of h W_hh'
    h_before,  # [tokens, H]: that h
    d_h0,  # [B, H] or None
    d_c0,
    T,
    B,
    tokens,
    step,
    row,
    d,
    CELL: tl.constexpr,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    PLACE: tl.constexpr,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    SPLIT: tl.constexpr,
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
    dh = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if d_h_n is not None:
        dh = tl.load(d_h_n + state_at, tile_in, 0.0).to(tl.float32)
    carry = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if d_c_n is not None:
        carry = tl.load(d_c_n + state_at, tile_in, 0.0).to(tl.float32)
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
        tl.store(h_before + state, h_in.to(h_before.dtype.element_ty), here)
        p_stats = stats + at * _STATS
        if CELL_STATE:
            mean_c = tl.load(p_stats + 1, active, 0.0)
            scale_c = tl.load(p_stats + 2, active, 0.0)
            hat_c = tl.where(here, (tl.load(cells + state, here, 0.0) - mean_c[:, None]) * scale_c[:, None], 0.0)
            c_in = load_either(cells, earlier_at, from_step, c0, state_at, from_initial)
            d_pre, new_carry, d_of_read = lstm_backward(
                saved, c_in, hat_c, scale_c, load_row(cell_gain, 0, units, units_in, H),
                load_row(cell_bias, 0, units, units_in, H), tl.where(here, grad, 0.0), carry, units_in, H,
            )  # fmt: skip
            tl.store(d_read + state, d_of_read.to(d_read.dtype.element_ty), here)
        else:
            d_pre, new_carry = CELL(saved, h_in, h_in, grad, carry)
        p_grads = d_gates + at[:, None] * (COLUMNS * H) + units[None, :]
        for k in tl.static_range(COLUMNS):
            tl.store(p_grads + PLACE[k] * H, d_pre[k].to(d_gates.dtype.element_ty), here)
        at_gates = at[:, None] * (GATES * H)
        of_x = load_columns(hats_x + at_gates, here, units, GATES, H)
        of_h = load_columns(hats + at_gates, here, units, GATES, H)
        d_x = ()
        d_h = ()
        for g in tl.static_range(GATES):
            for k in tl.static_range(COLUMNS):
                if INPUT[k] == g:
                    d_x = d_x + (tl.where(here, d_pre[k] * load_row(gain_x, g, units, units_in, H), 0.0),)
                if HIDDEN[k] == g:
                    d_h = d_h + (tl.where(here, d_pre[k] * load_row(gain, g, units, units_in, H), 0.0),)
        scale_x = tl.load(p_stats + 3, active, 0.0)
        scale_h = tl.load(p_stats, active, 0.0)
        to_x = block_gradients(d_x, of_x, scale_x, 0, SPLIT, units_in, H)
        to_h = block_gradients(d_h, of_h, scale_h, 0, SPLIT, units_in, H)
        if SPLIT < GATES:
            scale_x = tl.load(p_stats + 4, active, 0.0)
            scale_h = tl.load(p_stats + 1, active, 0.0)
            to_x = to_x + block_gradients(d_x, of_x, scale_x, SPLIT, GATES, units_in, H)
            to_h = to_h + block_gradients(d_h, of_h, scale_h, SPLIT, GATES, units_in, H)
        store_columns(d_inputs + at_gates, to_x, here, units, H)
        store_columns(d_products + at_gates, to_h, here, units, H)
        new_dh = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
        for g in tl.static_range(GATES):
            of_gate = to_h[g].to(d_products.dtype.element_ty)
            if resets is not None:
                of_gate = tl.where(anew[:, None], 0.0, of_gate)
            new_dh = dot(of_gate, weights[g], new_dh, PRECISION)
        if resets is not None:
            new_carry = tl.where(anew[:, None], 0.0, new_carry)
        dh = tl.where(active[:, None], new_dh, dh)
        carry = tl.where(active[:, None], new_carry, carry)
    if d_h0 is not None:
        if DIRECT:
            dh += carry
        tl.store(d_h0 + state_at, dh.to(d_h0.dtype.element_ty), tile_in)
    if d_c0 is not None:
        tl.store(d_c0 + state_at, carry.to(d_c0.dtype.element_ty), tile_in)


def without_room(hidden: int, dtype: torch.dtype, index: int | None) -> str | None:
    """Why no program of the GPU `index` holds these weights; None: one does."""
    device = devices.INTERPRETER if INTERPRETED else devices.of(torch.cuda.current_device() if index is None else index)
    if all(find(f"rnn_norm_{way}", dtype, hidden, device) for way in ("forward", "backward")):
        return None
    return (
        f"layer normalisation with hidden_size={hidden} in {dtype} on {device.name}: its kernels hold W_hh in one "
        "program, and no row of configs.json has one that large"
    )


def forward(cell: str, *args: Any) -> list[Tensor | None]:
    """Results of rnn_norm_forward, None for those that this call has not."""
    *options, states, save = args
    given = _aligned(Given(*options))
    x, w_ih = given.x, given.weights[0]
    batch = Batch.of(x, given.lengths, given.resets, given.batch_sizes, given.batch_first)
    results = norm_outputs(cell, given, states, save, batch.ragged, batch.B)
    if batch.ragged and save:  # what is summed over all tokens
        for saved in results[4:8]:
            if saved is not None:
                saved.zero_()
    out, h_n, c_n, _, hats, gates, cells, stats, _ = results
    inputs = torch.mm(x.reshape(batch.tokens, x.shape[-1]), w_ih.t())
    results[3] = inputs.view(*x.shape[:-1], w_ih.shape[0]) if save else None
    if batch.B:
        read = _parameters(given, ("gain_x", "bias_x", "gain", "bias", "cell_gain", "cell_bias"))
        tensors = (inputs, given.weights[1], *read, given.h0, given.c0, *batch.places, out, h_n, c_n)
        _launch("forward", cell, given, batch, (*tensors, hats, gates, cells, stats))
    return results


def backward(
    cell: str, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, d_c_out: Tensor | None, *args: Any
) -> list[Tensor]:  # fmt: skip
    """Results of rnn_norm_backward."""
    given = _aligned(Given(*args[:GIVEN]))
    out, hats_x, hats, gates, cells, stats, needs = args[GIVEN:]
    kind, x, hidden = CELLS[cell], given.x, given.hidden
    batch = Batch.of(x, given.lengths, given.resets, given.batch_sizes, given.batch_first)
    results = norm_gradients(given, needs)
    d_x, d_h0, d_c0, *d_weights = results
    new = x.new_zeros if batch.ragged else x.new_empty
    d_gates, d_inputs, d_products = (new((batch.tokens, n * hidden)) for n in (kind.columns, kind.gates, kind.gates))
    h_before, d_read = new((batch.tokens, hidden)), new((batch.tokens, hidden)) if kind.cell_state else None
    if batch.B:
        grads = (None if g is None else aligned(g) for g in (d_out, d_h_n, d_c_n))
        read = _parameters(given, ("gain_x", "gain", "cell_gain", "cell_bias"))
        saved = (out, hats_x, hats, gates, cells if kind.cell_state else None, stats)
        states = (d if d.numel() else None for d in (d_h0, d_c0))
        places = (given.h0, given.c0, *batch.places)
        tensors = (*grads, given.weights[1], *read, *places, *saved, d_gates, d_read, d_inputs, d_products, h_before)
        _launch("backward", cell, given, batch, (*tensors, *states))
    with without_autocast(x):
        if needs[0]:
            torch.mm(d_inputs, given.weights[0], out=d_x.view(batch.tokens, x.shape[-1]))
        if needs[3]:
            torch.mm(d_inputs.t(), x.reshape(batch.tokens, x.shape[-1]), out=d_weights[0])
            torch.mm(d_products.t(), h_before, out=d_weights[1])
            sums = _sums(cell, d_gates, d_read, hats_x.view(hats.shape), hats, cells, stats)
            results[5:] = spread_sums(sums, given.weights, given.norms)
    return results


def _sums(
    cell: str, d_gates: Tensor, d_read: Tensor | None, hats_x: Tensor, hats: Tensor, cells: Tensor | None, stats: Tensor
) -> Tensor:
    """As `spread_sums` has them."""
    kind = CELLS[cell]
    hidden = d_gates.shape[1] // kind.columns
    of_x = of_h = d_gates.narrow(1, 0, kind.gates * hidden)
    if kind.columns > kind.gates:
        places = [kind.PLACE[kind.HIDDEN.index(gate)] for gate in range(kind.gates)]
        of_h = torch.cat([d_gates.narrow(1, place * hidden, hidden) for place in places], 1)
    products = [of_h * hats, of_h, of_x * hats_x, of_x]
    if d_read is not None and cells is not None:
        products += [d_read * ((cells - stats.narrow(1, 1, 1)) * stats.narrow(1, 2, 1)), d_read]
    return torch.cat([p.sum(0, dtype=torch.float32) for p in products])


def _aligned(given: Given) -> Given:
    h0, c0 = given.h0, given.c0
    if h0 is not None and c0 is not None and h0.dtype != c0.dtype:
        h0, c0 = h0.float(), c0.float()
    h0, c0 = (None if s is None else aligned(s) for s in (h0, c0))
    weights, norms = ([aligned(t) for t in of] for of in given[6:8])
    return given._replace(h0=h0, c0=c0, weights=weights, norms=norms)


def _parameters(given: Given, names: Sequence[str]) -> tuple[Tensor | None, ...]:
    bias_x, bias = given.weights[2:] or (None, None)
    gain_x, gain, cell_gain, cell_bias = (*given.norms, None, None)[:4]
    found = {
        "gain_x": gain_x,
        "gain": gain,
        "bias_x": bias_x,
        "bias": bias,
        "cell_gain": cell_gain,
        "cell_bias": cell_bias,
    }
    return tuple(found[name] for name in names)


def _launch(way: str, cell: str, given: Given, batch: Batch, tensors: tuple[Tensor | None, ...]) -> None:
    kind, x = CELLS[cell], given.x
    config = choose(f"rnn_norm_{way}", x.dtype, given.hidden, device_of(x))
    constants: dict[str, Any] = {
        "CELL": getattr(kind, way), "INPUT": kind.INPUT, "HIDDEN": kind.HIDDEN, "GATES": kind.gates,
        "COLUMNS": kind.columns, "CELL_STATE": kind.cell_state, "SPLIT": 4 if kind.cell_state else 2,
        "H": given.hidden, "PRECISION": precision(x.dtype, tf32_allowed(x, "rnn")), **config.constants,
    }  # fmt: skip
    if way == "backward":
        constants |= {"PLACE": kind.PLACE, "DIRECT": kind.direct}
    kernel = forward_kernel if way == "forward" else backward_kernel
    grid = (cdiv(batch.B, config.blocks["rows"]),)
    args = (*tensors, *batch.sizes, int(given.reverse))
    run(x, Launch(kernel, grid, args, constants, config.warps, config.stages, unshared=True))
