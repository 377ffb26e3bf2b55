"""A decoder's loop, backward: the phases of decoder_forward.py undone, last step first.

Every phase pulls what it needs: a tile of a gradient sums, by products, over all that was made of its value, so that
nothing is added to by two programs, and the same numbers come out every time. Letters as in fastseq/ops/decoder.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import product, tile_of, wait_for_all, wide, zeros
from .decoder_forward import query_of, tiles_of
from .decoder_plan import CANDIDATE, CELL, CONTEXT, CONTEXT_FED, MAXOUT, QUERY, READ, RESET, SCORE, TANH
from .scores import additive_backward, attended_of

__all__ = ["Found", "Given", "decoder_backward"]


class Given(NamedTuple):
    """Gradients of the loop's results, contiguous, or None."""

    hs: Any  # [N, T, H]: of the last cell
    contexts: Any  # [N, T, D]
    outs: Any  # [N, T, R]
    weights: Any  # [N, T, S]
    feed_n: Any  # [N, F]
    h_n: Any  # K times [N, H]


class Found(NamedTuple):
    """What backward makes, of every step: in y's dtype but where said."""

    gates: Any  # [C, N, T, columns * H]: of the pre-activations
    queries: Any  # [N, T, A]: of what asks
    read: Any  # [N, T, R']: of the readout's pre-activations
    contexts: Any  # [N, T, D]
    scores: Any  # [N, T, S] in fp32
    carry: Any  # [K, N, H] in fp32, from step to step: as in csrc/cells.h, of one cell
    weights: Any  # [N, S] in fp32, from phase to phase
    arrived: Any  # int32 [1], 0: the barrier's


@triton.jit
def _pull(acc, d, d_row, n, n_in, w, pitch, u, u_in, K: tl.constexpr, Z: tl.constexpr):
    """acc[n, u] + sum_k d[n, k] w[k, u]."""
    accs = product(
        (acc,), (0,), d, d_row, n, n_in, w, 1, pitch, u, u_in, 0, K, Z.blocks.k, Z.PRECISION
    )  # fmt: skip
    return accs[0]


@triton.jit
def _recurrent(acc, x, found, C: tl.constexpr, t, n, n_in, u, u_in, N, T, Z: tl.constexpr):
    """acc plus the gradient of the state that cell C started from at step t, through W_hh. t may be T: then nothing."""
    H: tl.constexpr = Z.H
    there = n_in & (t < T)
    d = found.gates + (C * N * T + t) * Z.columns * H
    return _pull(acc, d, T * Z.columns * H, n, there, x.w_hh[C], H, u, u_in, Z.recurrent * H, Z)


@triton.jit
def _input(acc, x, found, C: tl.constexpr, FROM: tl.constexpr, t, n, n_in, u, u_in, N, T, Z: tl.constexpr):
    """acc plus the gradient of a part of cell C's input, through w_ih's columns from FROM on. t may be T."""
    H: tl.constexpr = Z.H
    there = n_in & (t < T)
    d = found.gates + (C * N * T + t) * Z.columns * H
    row = T * Z.columns * H
    w = x.w_ih[C] + FROM
    pitch: tl.constexpr = Z.cells[C].pitch
    if Z.recurrent == 3:  # a GRU: U_n h, which the input does not reach, stands before W_n x
        acc = _pull(acc, d, row, n, there, w, pitch, u, u_in, 2 * H, Z)
        acc = _pull(acc, d + 3 * H, row, n, there, w + 2 * H * pitch, pitch, u, u_in, H, Z)
    else:
        acc = _pull(acc, d, row, n, there, w, pitch, u, u_in, Z.gates * H, Z)
    return acc


@triton.jit
def _part(acc, x, found, FROM: tl.constexpr, t, n, n_in, u, u_in, T, Z: tl.constexpr):
    """acc plus the gradient of a part of the readout of step t, w_read's columns from FROM on. t may be T."""
    rows: tl.constexpr = 2 * Z.R if Z.combine == MAXOUT else Z.R
    there = n_in & (t < T)
    d = _pull(
        zeros(Z.blocks.n, Z.blocks.u), found.read + t * rows, T * rows, n, there, x.w_read + FROM, Z.P, u, u_in, rows, Z
    )
    if x.read_mask is not None:
        at = x.read_mask + (n[:, None] * T + t) * Z.P + FROM + u[None, :]
        d *= tl.load(at, there[:, None] & u_in[None, :], 0.0).to(tl.float32)
    return acc + d


@triton.jit
def _asked(acc, x, found, t, n, n_in, u, u_in, T, Z: tl.constexpr):
    """acc plus the gradient of the state that asks at step t. t may be T."""
    there = n_in & (t < T)
    if Z.projects:
        acc = _pull(acc, found.queries + t * Z.A, T * Z.A, n, there, x.w_query, Z.H, u, u_in, Z.A, Z)
    else:
        at = found.queries + (n[:, None] * T + t) * Z.A + u[None, :]
        acc += tl.load(at, there[:, None] & u_in[None, :], 0.0, cache_modifier=".cg").to(tl.float32)
    return acc


@triton.jit
def _of_state(x, given, found, C: tl.constexpr, t, n, n_in, u, u_in, N, T, Z: tl.constexpr):
    """A tile of the gradient of cell C's state of step t, but for what the carry holds."""
    H: tl.constexpr = Z.H
    there = n_in[:, None] & u_in[None, :]
    last: tl.constexpr = len(Z.cells) - 1
    layer: tl.constexpr = Z.cells[C].layer
    between: tl.constexpr = Z.cells[0].before == 1
    d = zeros(Z.blocks.n, Z.blocks.u)
    if last == C:
        if given.hs is not None:
            d += tl.load(given.hs + (n[:, None] * T + t) * H + u[None, :], there, 0.0).to(tl.float32)
        if Z.r_state >= 0:
            d = _part(d, x, found, Z.r_state, t, n, n_in, u, u_in, T, Z)
        if Z.r_prev >= 0:
            d = _part(d, x, found, Z.r_prev, t + 1, n, n_in, u, u_in, T, Z)
    if last == C or not between:
        if given.h_n[layer] is not None:
            ends = there & (t == T - 1)
            d += tl.load(given.h_n[layer] + n[:, None] * H + u[None, :], ends, 0.0).to(tl.float32)
    if between:  # the second cell starts from the first one's state
        if C == 0:
            d = _recurrent(d, x, found, 1, t, n, n_in, u, u_in, N, T, Z)
        else:
            d = _recurrent(d, x, found, 0, t + 1, n, n_in, u, u_in, N, T, Z)
    else:
        d = _recurrent(d, x, found, C, t + 1, n, n_in, u, u_in, N, T, Z)
        if last > C:
            above = _input(zeros(Z.blocks.n, Z.blocks.u), x, found, C + 1, 0, t, n, n_in, u, u_in, N, T, Z)
            if x.layer_masks is not None:
                at = x.layer_masks + ((C * N + n[:, None]) * T + t) * H + u[None, :]
                above *= tl.load(at, there, 0.0).to(tl.float32)
            d += above
    if Z.attends:
        if Z.query_cell == C:
            d = _asked(d, x, found, t + (1 - Z.query_offset), n, n_in, u, u_in, T, Z)
    return d


@triton.jit
def _load_saved(made, C: tl.constexpr, t, n, u, there, N, T, G: tl.constexpr, Z: tl.constexpr):
    at = made.gates + (((C * N + n[:, None]) * T + t) * 4 + G) * Z.H + u[None, :]
    return tl.load(at, there, 0.0).to(tl.float32)


@triton.jit
def _before(made, C: tl.constexpr, t, n, u, there, N, T, Z: tl.constexpr):
    """The state that cell C started from at step t."""
    at = (Z.cells[C].before * N + n[:, None]) * (T + 1) + t + Z.cells[C].offset
    return tl.load(made.hs + at * Z.H + u[None, :], there, 0.0).to(tl.float32)


@triton.jit
def _cell(tile, x, made, given, found, c0, C: tl.constexpr, t, N, T, Z: tl.constexpr, BACKWARD: tl.constexpr):
    """A tile of the gradients of cell C's pre-activations."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    dh = _of_state(x, given, found, C, t, n, n_in, u, u_in, N, T, Z)
    own = n[:, None] * H + u[None, :]
    carried = found.carry + Z.cells[C].layer * N * H + own
    saved = ()
    for g in tl.static_range(4):
        saved = saved + (_load_saved(made, C, t, n, u, there, N, T, g, Z),)
    if Z.lstm:
        after = tl.load(made.cs + ((C * N + n[:, None]) * T + t) * H + u[None, :], there, 0.0)
        earlier = t - 1 + Z.cells[C].offset
        at = made.cs + ((Z.cells[C].before * N + n[:, None]) * T + earlier) * H + u[None, :]
        before = tl.load(at, there & (earlier >= 0), 0.0)
        before += tl.load(c0[Z.cells[C].layer] + own, there & (earlier < 0), 0.0).to(tl.float32)
    else:
        before = _before(made, C, t, n, u, there, N, T, Z)
        after = before
    d, carry = BACKWARD(saved, before, after, dh, tl.load(carried, there, 0.0))
    tl.store(carried, carry, there)
    for g in tl.static_range(4):
        to = found.gates + (((C * N + n[:, None]) * T + t) * 4 + g) * H + u[None, :]
        tl.store(to, d[g].to(found.gates.dtype.element_ty), there)


@triton.jit
def _candidate(tile, x, made, given, found, C: tl.constexpr, t, N, T, Z: tl.constexpr):
    """A tile of the gradients of a gru_reset_before's z and n."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    dh = _of_state(x, given, found, C, t, n, n_in, u, u_in, N, T, Z)
    carried = found.carry + (Z.cells[C].layer * N + n[:, None]) * H + u[None, :]
    dh += tl.load(carried, there, 0.0)
    z = _load_saved(made, C, t, n, u, there, N, T, 1, Z)
    candidate = _load_saved(made, C, t, n, u, there, N, T, 3, Z)
    before = _before(made, C, t, n, u, there, N, T, Z)
    tl.store(carried, dh * z, there)
    to = found.gates + ((C * N + n[:, None]) * T + t) * 3 * H + u[None, :]
    tl.store(to + H, (dh * (before - candidate) * z * (1 - z)).to(found.gates.dtype.element_ty), there)
    d = dh * (1 - z) * (1 - candidate * candidate)
    tl.store(to + 2 * H, d.to(found.gates.dtype.element_ty), there)


@triton.jit
def _reset(tile, x, made, found, C: tl.constexpr, t, N, T, Z: tl.constexpr):
    """A tile of the gradients of a gru_reset_before's r, through r h, which U_n reads."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    d = found.gates + ((C * N * T + t) * 3 + 2) * H
    d = _pull(zeros(Z.blocks.n, Z.blocks.u), d, 3 * T * H, n, n_in, x.w_hh[C] + 2 * H * H, H, u, u_in, H, Z)
    r = _load_saved(made, C, t, n, u, there, N, T, 0, Z)
    reset = _load_saved(made, C, t, n, u, there, N, T, 2, Z)
    carried = found.carry + (Z.cells[C].layer * N + n[:, None]) * H + u[None, :]
    tl.store(carried, tl.load(carried, there, 0.0) + d * r, there)
    to = found.gates + ((C * N + n[:, None]) * T + t) * 3 * H + u[None, :]
    tl.store(to, (d * reset * (1 - r)).to(found.gates.dtype.element_ty), there)


@triton.jit
def _context(tile, x, given, found, t, N, T, Z: tl.constexpr):
    """A tile of the gradient of step t's context."""
    n, n_in, u, u_in = tile_of(tile, N, Z.D, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    D: tl.constexpr = Z.D
    d = zeros(Z.blocks.n, Z.blocks.u)
    if given.contexts is not None:
        d += tl.load(given.contexts + (n[:, None] * T + t) * D + u[None, :], there, 0.0).to(tl.float32)
    if Z.feed == CONTEXT_FED:
        d = _input(d, x, found, 0, Z.cells[0].feed, t + 1, n, n_in, u, u_in, N, T, Z)
        if given.feed_n is not None:
            ends = there & (t == T - 1)
            d += tl.load(given.feed_n + n[:, None] * D + u[None, :], ends, 0.0).to(tl.float32)
    if Z.r_context >= 0:
        d = _part(d, x, found, Z.r_context, t, n, n_in, u, u_in, T, Z)
    for i in tl.static_range(len(Z.cells)):
        if Z.cells[i].context >= 0:
            d = _input(d, x, found, i, Z.cells[i].context, t, n, n_in, u, u_in, N, T, Z)
    to = found.contexts + (n[:, None] * T + t) * D + u[None, :]
    tl.store(to, d.to(found.contexts.dtype.element_ty), there)


@triton.jit
def _weight(tile, x, given, found, t, N, T, S, COPIES, Z: tl.constexpr):
    """The gradient of one row's weights at a block of source positions."""
    blocks = tl.cdiv(S, Z.blocks.s)
    n = wide(tile // blocks)
    b = n // COPIES
    s = (tile % blocks) * Z.blocks.s + tl.arange(0, Z.blocks.s)
    seen = attended_of(x.mask, b, s, S)
    gradient = zeros(Z.blocks.s)
    for d0 in range(0, Z.D, Z.blocks.d):
        d = d0 + tl.arange(0, Z.blocks.d)
        d_in = d < Z.D
        of = tl.load(found.contexts + (n * T + t) * Z.D + d, d_in, 0.0, cache_modifier=".cg").to(tl.float32)
        rows = x.memory + (b * S + s[:, None]) * Z.D + d[None, :]
        values = tl.load(rows, seen[:, None] & d_in[None, :], 0.0).to(tl.float32)
        gradient += tl.sum(values * of[None, :], 1)
    if given.weights is not None:
        gradient += tl.load(given.weights + (n * T + t) * S + s, seen, 0.0).to(tl.float32)
    tl.store(found.weights + n * S + s, gradient, s < S)


@triton.jit
def _query(tile, x, made, found, t, N, T, S, COPIES, Z: tl.constexpr):
    """One row's gradients of its scores, and of a block of units of its query."""
    across: tl.constexpr = (Z.A + Z.blocks.a - 1) // Z.blocks.a
    n = wide(tile // across)
    b = n // COPIES
    a = (tile % across) * Z.blocks.a + tl.arange(0, Z.blocks.a)
    a_in = a < Z.A
    weights = made.weights + (n * T + t) * S
    mean = tl.full((), 0.0, tl.float32)
    for s0 in range(0, S, Z.blocks.s):
        s = s0 + tl.arange(0, Z.blocks.s)
        weight = tl.load(weights + s, s < S, 0.0).to(tl.float32)
        mean += tl.sum(weight * tl.load(found.weights + n * S + s, s < S, 0.0, cache_modifier=".cg"), 0)
    q = tl.load(query_of(x, made, n, t, N, T, Z) + a, a_in, 0.0).to(tl.float32)
    gradient = zeros(Z.blocks.a)
    for s0 in range(0, S, Z.blocks.s):
        s = s0 + tl.arange(0, Z.blocks.s)
        weight = tl.load(weights + s, s < S, 0.0).to(tl.float32)
        d = weight * (tl.load(found.weights + n * S + s, s < S, 0.0, cache_modifier=".cg") - mean)
        seen = attended_of(x.mask, b, s, S)
        key = tl.load(x.keys + (b * S + s[:, None]) * Z.A + a[None, :], seen[:, None] & a_in[None, :], 0.0)
        key = key.to(tl.float32)
        if Z.additive:
            gradient += tl.sum(additive_backward(key, q[None, :], d[:, None], Z.fast)[0], 0)
        else:
            gradient += tl.sum(d[:, None] * key, 0)
        if tile % across == 0:
            tl.store(found.scores + (n * T + t) * S + s, d, s < S)
    if Z.additive:
        gradient *= tl.load(x.v + a, a_in, 0.0).to(tl.float32)
    to = found.queries + (n * T + t) * Z.A + a
    tl.store(to, gradient.to(found.queries.dtype.element_ty), a_in)


@triton.jit
def _read(tile, x, made, given, found, t, N, T, Z: tl.constexpr):
    """A tile of the gradient of the fed readout's pre-activations."""
    R: tl.constexpr = Z.R
    n, n_in, u, u_in = tile_of(tile, N, R, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    token = n[:, None] * T + t
    d = zeros(Z.blocks.n, Z.blocks.u)
    if given.outs is not None:
        d += tl.load(given.outs + token * R + u[None, :], there, 0.0).to(tl.float32)
    d = _input(d, x, found, 0, Z.cells[0].feed, t + 1, n, n_in, u, u_in, N, T, Z)
    if given.feed_n is not None:
        d += tl.load(given.feed_n + n[:, None] * R + u[None, :], there & (t == T - 1), 0.0).to(tl.float32)
    if x.out_mask is not None:
        d *= tl.load(x.out_mask + token * R + u[None, :], there, 0.0).to(tl.float32)
    dtype = found.read.dtype.element_ty
    if Z.combine == MAXOUT:
        at = token * 2 * R + 2 * u[None, :]
        first = tl.load(made.read_saved + at, there, 0.0).to(tl.float32)
        second = tl.load(made.read_saved + at + 1, there, 0.0).to(tl.float32)
        tl.store(found.read + at, tl.where(first >= second, d, 0.0).to(dtype), there)
        tl.store(found.read + at + 1, tl.where(first >= second, 0.0, d).to(dtype), there)
    else:
        if Z.combine == TANH:
            if made.read_saved is not None:
                out = tl.load(made.read_saved + token * R + u[None, :], there, 0.0)
            else:
                out = tl.load(made.outs + (n[:, None] * (T + 1) + t + 1) * R + u[None, :], there, 0.0)
            out = out.to(tl.float32)
            d *= 1 - out * out
        tl.store(found.read + token * R + u[None, :], d.to(dtype), there)


@triton.jit
def _tiles(KIND: tl.constexpr, N, S, Z: tl.constexpr):
    """The tiles of a phase."""
    if KIND == QUERY:
        tiles = N * ((Z.A + Z.blocks.a - 1) // Z.blocks.a)
    elif KIND == SCORE:
        tiles = N * tl.cdiv(S, Z.blocks.s)
    elif KIND <= CANDIDATE:
        tiles = tiles_of(N, Z.H, Z.blocks.n, Z.blocks.u)
    elif KIND == READ:
        tiles = tiles_of(N, Z.R, Z.blocks.n, Z.blocks.u)
    else:
        tiles = tiles_of(N, Z.D, Z.blocks.n, Z.blocks.u)
    return tiles


@triton.jit(do_not_specialize=["N", "T", "S", "COPIES", "t0", "t1", "p0", "p1"])
def decoder_backward(
    x, made, given, found, c0, N, T, S, COPIES, t0, t1, p0, p1, Z: tl.constexpr, BACKWARD: tl.constexpr,
    BARRIER: tl.constexpr,
):  # fmt: skip
    """Phases [p0, p1), as `Static.undone` has them, of steps T - 1 - t0 down to T - t1.

    x: Read, made: Made, given: Given, found: Found; c0: of an LSTM's layers, a tuple. Without
    BARRIER no phase may follow another in the launch.
    """
    arrived = 0
    rows = wide(N)
    steps = wide(T)
    for step in range(t0, t1):
        t = steps - 1 - step
        for p in tl.static_range(len(Z.undone)):
            if (p >= p0) & (p < p1):
                kind: tl.constexpr = Z.undone[p][0]
                cell: tl.constexpr = Z.undone[p][1]
                for tile in range(tl.program_id(0), _tiles(kind, N, S, Z), tl.num_programs(0)):
                    if kind == CELL:
                        _cell(tile, x, made, given, found, c0, cell, t, rows, steps, Z, BACKWARD)
                    elif kind == CANDIDATE:
                        _candidate(tile, x, made, given, found, cell, t, rows, steps, Z)
                    elif kind == RESET:
                        _reset(tile, x, made, found, cell, t, rows, steps, Z)
                    elif kind == CONTEXT:
                        _context(tile, x, given, found, t, rows, steps, Z)
                    elif kind == SCORE:
                        _weight(tile, x, given, found, t, rows, steps, S, COPIES, Z)
                    elif kind == QUERY:
                        _query(tile, x, made, found, t, rows, steps, S, COPIES, Z)
                    else:
                        _read(tile, x, made, given, found, t, rows, steps, Z)
                if BARRIER:
                    if (step + 1 < t1) | (p + 1 < p1):  # after the last the kernel ends
                        arrived += tl.num_programs(0)
                        wait_for_all(found.arrived, arrived)
