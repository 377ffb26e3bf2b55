"""A decoder's loop, forward: every phase of every step, in one launch where a grid can wait for itself.

A step is a row of phases (`decoder_plan`), each a set of independent tiles; between two phases all programs wait for
each other, or each phase is a launch of its own. Letters as in fastseq/ops/decoder.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .blocks import add_rows, product, tanh, tile_of, wait_for_all, wide, zeros
from .decoder_plan import CANDIDATE, CELL, CONTEXT_FED, MAXOUT, QUERY, READ, RESET, SCORE, TANH
from .scores import additive, attended_of

__all__ = ["Made", "Read", "Work", "decoder_forward"]


class Read(NamedTuple):
    """What the loop reads, but for what it makes itself: LoopTensors, with the products with y done beforehand."""

    projected: Any  # [N, T, G*H]: W_ih y + b_ih of the first cell
    read_input: Any  # [N, T, R']: the readout's product with y
    keys: Any
    memory: Any
    mask: Any
    beside: Any
    w_query: Any
    v: Any
    w_read: Any
    b_read: Any
    layer_masks: Any
    read_mask: Any
    out_mask: Any
    w_ih: Any  # a tuple, one of each cell, as are those below
    w_hh: Any
    b_ih: Any
    b_hh: Any


class Made(NamedTuple):
    """KEPT of fastseq/ops/decoder_types.py. Without `save` queries is [N, 1, A], and gates, cs, read_saved absent."""

    hs: Any
    contexts: Any
    outs: Any
    weights: Any
    gates: Any
    cs: Any
    queries: Any
    read_saved: Any


class Work(NamedTuple):
    """What goes from phase to phase or, in fp32, from step to step."""

    h: Any  # [K, N, H]
    c: Any  # [K, N, H] of an LSTM
    scores: Any  # [N, S]
    z: Any  # [N, H], and the two below: of a gru_reset_before, between its phases
    candidate: Any  # [N, H]: W_n x + b_in
    reset: Any  # [N, H] in y's dtype: r h
    arrived: Any  # int32 [1], 0: the barrier's


@triton.jit
def tiles_of(N, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr):
    return tl.cdiv(N, BLOCK_N) * ((WIDTH + BLOCK_U - 1) // BLOCK_U)


@triton.jit
def _zeros(Z: tl.constexpr):
    zero = zeros(Z.blocks.n, Z.blocks.u)
    return (zero, zero, zero, zero)


@triton.jit
def _inputs(x, made, C: tl.constexpr, t, n, n_in, u, u_in, N, T, Z: tl.constexpr):
    """W_ih of cell C times the parts that it reads, and b_ih: pre-activations but for the recurrent product."""
    H: tl.constexpr = Z.H
    accs = _zeros(Z)
    w = x.w_ih[C]
    pitch: tl.constexpr = Z.cells[C].pitch
    if C == 0:
        accs = add_rows(
            accs, Z.INPUT, x.projected + t * Z.gates * H, T * Z.gates * H, n, n_in, u, u_in, H
        )  # fmt: skip
    else:
        accs = add_rows(accs, Z.INPUT, x.b_ih[C], 0, n, n_in, u, u_in, H)
    if Z.cells[C].below >= 0:
        hs = made.hs + ((C - 1) * N * (T + 1) + t + 1) * H
        factor = None
        if x.layer_masks is not None:
            factor = x.layer_masks + ((C - 1) * N * T + t) * H
        accs = product(
            accs, Z.INPUT, hs, (T + 1) * H, n, n_in, w + Z.cells[C].below, pitch, 1, u, u_in, H, H, Z.blocks.k,
            Z.PRECISION, factor, T * H,
        )  # fmt: skip
    if Z.cells[C].feed >= 0:
        fed = made.outs
        if Z.feed == CONTEXT_FED:
            fed = made.contexts
        accs = product(
            accs, Z.INPUT, fed + t * Z.F, (T + 1) * Z.F, n, n_in, w + Z.cells[C].feed, pitch, 1, u, u_in, H, Z.F,
            Z.blocks.k, Z.PRECISION,
        )  # fmt: skip
    if Z.cells[C].context >= 0:
        shift: tl.constexpr = 1 if Z.feed == CONTEXT_FED else 0
        accs = product(
            accs, Z.INPUT, made.contexts + (t + shift) * Z.D, (T + shift) * Z.D, n, n_in, w + Z.cells[C].context,
            pitch, 1, u, u_in, H, Z.D, Z.blocks.k, Z.PRECISION,
        )  # fmt: skip
    return accs


@triton.jit
def _recurrent(accs, x, made, C: tl.constexpr, t, n, n_in, u, u_in, N, T, Z: tl.constexpr):
    """accs plus W_hh times the state that cell C starts from, b_hh and what is beside."""
    H: tl.constexpr = Z.H
    hs = made.hs + (Z.cells[C].before * N * (T + 1) + t + Z.cells[C].offset) * H
    accs = product(accs, Z.HIDDEN, hs, (T + 1) * H, n, n_in, x.w_hh[C], H, 1, u, u_in, H, H, Z.blocks.k, Z.PRECISION)
    accs = add_rows(accs, Z.HIDDEN, x.b_hh[C], 0, n, n_in, u, u_in, H)
    if C == 0:
        if x.beside is not None:
            accs = add_rows(accs, Z.HIDDEN, x.beside, Z.gates * H, n, n_in, u, u_in, H)
    return accs


@triton.jit
def _cell(tile, x, made, work, C: tl.constexpr, t, N, T, Z: tl.constexpr, FORWARD: tl.constexpr):
    """A tile of cell C's next state."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    accs = _inputs(x, made, C, t, n, n_in, u, u_in, N, T, Z)
    accs = _recurrent(accs, x, made, C, t, n, n_in, u, u_in, N, T, Z)
    carried = (Z.cells[C].layer * N + n[:, None]) * H + u[None, :]
    h = tl.load(work.h + carried, there, 0.0)
    c = h
    if Z.lstm:
        c = tl.load(work.c + carried, there, 0.0)
    h, c, saved = FORWARD(accs, h, c)
    tl.store(work.h + carried, h, there)
    state = made.hs + ((C * N + n[:, None]) * (T + 1) + t + 1) * H + u[None, :]
    tl.store(state, h.to(made.hs.dtype.element_ty), there)
    token = (C * N + n[:, None]) * T + t
    if Z.lstm:
        tl.store(work.c + carried, c, there)
        if Z.save:
            tl.store(made.cs + token * H + u[None, :], c, there)
    if Z.save:
        for g in tl.static_range(4):
            to = made.gates + (token * 4 + g) * H + u[None, :]
            tl.store(to, saved[g].to(made.gates.dtype.element_ty), there)


@triton.jit
def _reset(tile, x, made, work, C: tl.constexpr, t, N, T, Z: tl.constexpr):
    """A tile of a gru_reset_before's gates r and z, of r h and of the candidate's input product."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    accs = _inputs(x, made, C, t, n, n_in, u, u_in, N, T, Z)
    accs = _recurrent(accs, x, made, C, t, n, n_in, u, u_in, N, T, Z)
    r = tl.sigmoid(accs[0])
    z = tl.sigmoid(accs[1])
    own = n[:, None] * H + u[None, :]
    reset = r * tl.load(work.h + Z.cells[C].layer * N * H + own, there, 0.0)
    tl.store(work.reset + own, reset.to(work.reset.dtype.element_ty), there)
    tl.store(work.z + own, z, there)
    tl.store(work.candidate + own, accs[2], there)
    if Z.save:
        to = made.gates + ((C * N + n[:, None]) * T + t) * 4 * H + u[None, :]
        tl.store(to, r.to(made.gates.dtype.element_ty), there)
        tl.store(to + H, z.to(made.gates.dtype.element_ty), there)
        tl.store(to + 2 * H, reset.to(made.gates.dtype.element_ty), there)


@triton.jit
def _candidate(tile, x, made, work, C: tl.constexpr, t, N, T, Z: tl.constexpr):
    """A tile of a gru_reset_before's next state."""
    H: tl.constexpr = Z.H
    n, n_in, u, u_in = tile_of(tile, N, H, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    accs = product(
        (zeros(Z.blocks.n, Z.blocks.u),), (2,), work.reset, H, n, n_in, x.w_hh[C], H, 1, u, u_in, H, H,
        Z.blocks.k, Z.PRECISION,
    )  # fmt: skip
    accs = add_rows(accs, (2,), x.b_hh[C], 0, n, n_in, u, u_in, H)
    own = n[:, None] * H + u[None, :]
    candidate = tanh(accs[0] + tl.load(work.candidate + own, there, 0.0))
    carried = work.h + Z.cells[C].layer * N * H + own
    h = candidate + tl.load(work.z + own, there, 0.0) * (tl.load(carried, there, 0.0) - candidate)
    tl.store(carried, h, there)
    state = made.hs + ((C * N + n[:, None]) * (T + 1) + t + 1) * H + u[None, :]
    tl.store(state, h.to(made.hs.dtype.element_ty), there)
    if Z.save:
        to = made.gates + (((C * N + n[:, None]) * T + t) * 4 + 3) * H + u[None, :]
        tl.store(to, candidate.to(made.gates.dtype.element_ty), there)


@triton.jit
def _query(tile, x, made, t, N, T, Z: tl.constexpr):
    """A tile of W_q times the state that asks."""
    n, n_in, u, u_in = tile_of(tile, N, Z.A, Z.blocks.n, Z.blocks.u)
    hs = made.hs + (Z.query_cell * N * (T + 1) + t + Z.query_offset) * Z.H
    accs = product(
        (zeros(Z.blocks.n, Z.blocks.u),), (0,), hs, (T + 1) * Z.H, n, n_in, x.w_query, Z.H, 1, u, u_in,
        Z.A, Z.H, Z.blocks.k, Z.PRECISION,
    )  # fmt: skip
    row = n * T + t if Z.save else n
    to = made.queries + row[:, None] * Z.A + u[None, :]
    tl.store(to, accs[0].to(made.queries.dtype.element_ty), n_in[:, None] & u_in[None, :])


@triton.jit
def query_of(x, made, n, t, N, T, Z: tl.constexpr):
    """Where the query of row n at step t lies."""
    if Z.projects:
        row = n * T + t if Z.save else n
        at = made.queries + row * Z.A
    else:
        at = made.hs + ((Z.query_cell * N + n) * (T + 1) + t + Z.query_offset) * Z.H
    return at


@triton.jit
def _score(tile, x, made, work, t, N, T, S, COPIES, Z: tl.constexpr):
    """Scores of one row at a block of source positions; -inf where masked."""
    blocks = tl.cdiv(S, Z.blocks.s)
    n = wide(tile // blocks)
    b = n // COPIES
    s = (tile % blocks) * Z.blocks.s + tl.arange(0, Z.blocks.s)
    seen = attended_of(x.mask, b, s, S)
    query = query_of(x, made, n, t, N, T, Z)
    score = zeros(Z.blocks.s)
    for a0 in range(0, Z.A, Z.blocks.a):
        a = a0 + tl.arange(0, Z.blocks.a)
        a_in = a < Z.A
        key = tl.load(x.keys + (b * S + s[:, None]) * Z.A + a[None, :], seen[:, None] & a_in[None, :], 0.0)
        q = tl.load(query + a, a_in, 0.0, cache_modifier=".cg").to(tl.float32)
        key = key.to(tl.float32)
        if Z.additive:
            by = tl.load(x.v + a, a_in, 0.0).to(tl.float32)
            score += tl.sum(additive(key, q[None, :], by[None, :], Z.fast), 1)
        else:
            score += tl.sum(key * q[None, :], 1)
    tl.store(work.scores + n * S + s, tl.where(seen, score, -float("inf")), s < S)


@triton.jit
def _context(tile, x, made, work, t, N, T, S, COPIES, Z: tl.constexpr):
    """One row's weights, and a block of features of its context. A row that sees nothing gets zeros."""
    across: tl.constexpr = (Z.D + Z.blocks.d - 1) // Z.blocks.d
    n = wide(tile // across)
    b = n // COPIES
    d = (tile % across) * Z.blocks.d + tl.arange(0, Z.blocks.d)
    d_in = d < Z.D
    scores = work.scores + n * S
    most = tl.full((), -float("inf"), tl.float32)
    for s0 in range(0, S, Z.blocks.s):
        s = s0 + tl.arange(0, Z.blocks.s)
        most = tl.maximum(most, tl.max(tl.load(scores + s, s < S, -float("inf"), cache_modifier=".cg"), 0))
    most = tl.where(most == -float("inf"), 0.0, most)
    total = tl.full((), 0.0, tl.float32)
    context = zeros(Z.blocks.d)
    for s0 in range(0, S, Z.blocks.s):
        s = s0 + tl.arange(0, Z.blocks.s)
        score = tl.load(scores + s, s < S, -float("inf"), cache_modifier=".cg")
        raised = tl.exp(score - most)
        total += tl.sum(raised, 0)
        seen = score != -float("inf")
        rows = x.memory + (b * S + s[:, None]) * Z.D + d[None, :]
        values = tl.load(rows, seen[:, None] & d_in[None, :], 0.0).to(tl.float32)
        context += tl.sum(raised[:, None] * values, 0)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    shift: tl.constexpr = 1 if Z.feed == CONTEXT_FED else 0
    to = made.contexts + (n * (T + shift) + t + shift) * Z.D + d
    tl.store(to, (context * share).to(made.contexts.dtype.element_ty), d_in)
    if made.weights is not None:
        if tile % across == 0:
            for s0 in range(0, S, Z.blocks.s):
                s = s0 + tl.arange(0, Z.blocks.s)
                score = tl.load(scores + s, s < S, -float("inf"), cache_modifier=".cg")
                weight = tl.exp(score - most) * share
                tl.store(made.weights + (n * T + t) * S + s, weight.to(made.weights.dtype.element_ty), s < S)


@triton.jit
def _read_part(
    accs, x, at, row, FROM: tl.constexpr, K: tl.constexpr, PAIR: tl.constexpr, t, n, n_in, u, u_in, T, Z: tl.constexpr
):
    """accs plus w_read's columns from FROM on times a part [N, K]; of maxout, two rows of w_read for each output."""
    factor = None
    if x.read_mask is not None:
        factor = x.read_mask + t * Z.P + FROM
    w = x.w_read + FROM
    first = product(
        (accs[0],), (0,), at, row, n, n_in, w, PAIR * Z.P, 1, u, u_in, Z.R, K, Z.blocks.k, Z.PRECISION, factor, T * Z.P
    )
    second = (accs[1],)
    if PAIR == 2:
        second = product(
            (accs[1],), (0,), at, row, n, n_in, w + Z.P, 2 * Z.P, 1, u, u_in, Z.R, K, Z.blocks.k, Z.PRECISION, factor,
            T * Z.P,
        )  # fmt: skip
    return (first[0], second[0])


@triton.jit
def _read(tile, x, made, t, N, T, Z: tl.constexpr):
    """A tile of the fed readout."""
    n, n_in, u, u_in = tile_of(tile, N, Z.R, Z.blocks.n, Z.blocks.u)
    there = n_in[:, None] & u_in[None, :]
    H: tl.constexpr = Z.H
    pair: tl.constexpr = 2 if Z.combine == MAXOUT else 1
    zero = zeros(Z.blocks.n, Z.blocks.u)
    accs = (zero, zero)
    hs = made.hs + ((len(Z.cells) - 1) * N * (T + 1) + t) * H
    if Z.r_state >= 0:
        accs = _read_part(accs, x, hs + H, (T + 1) * H, Z.r_state, H, pair, t, n, n_in, u, u_in, T, Z)
    if Z.r_prev >= 0:
        accs = _read_part(accs, x, hs, (T + 1) * H, Z.r_prev, H, pair, t, n, n_in, u, u_in, T, Z)
    if Z.r_context >= 0:
        accs = _read_part(
            accs, x, made.contexts + t * Z.D, T * Z.D, Z.r_context, Z.D, pair, t, n, n_in, u, u_in, T, Z
        )  # fmt: skip
    token = n[:, None] * T + t
    at = pair * u[None, :]
    if x.read_input is not None:
        rows = x.read_input + token * pair * Z.R + at
        accs = (accs[0] + tl.load(rows, there, 0.0).to(tl.float32), accs[1])
        if pair == 2:
            accs = (accs[0], accs[1] + tl.load(rows + 1, there, 0.0).to(tl.float32))
    if x.b_read is not None:
        accs = (accs[0] + tl.load(x.b_read + at, u_in[None, :], 0.0).to(tl.float32), accs[1])
        if pair == 2:
            accs = (accs[0], accs[1] + tl.load(x.b_read + at + 1, u_in[None, :], 0.0).to(tl.float32))
    out = accs[0]
    if Z.combine == TANH:
        out = tanh(out)
    if Z.combine == MAXOUT:
        out = tl.maximum(accs[0], accs[1])
    if made.read_saved is not None:
        to = made.read_saved + token * pair * Z.R + at
        dtype = made.read_saved.dtype.element_ty
        if Z.combine == MAXOUT:
            tl.store(to, accs[0].to(dtype), there)
            tl.store(to + 1, accs[1].to(dtype), there)
        else:
            tl.store(to, out.to(dtype), there)
    if x.out_mask is not None:
        out *= tl.load(x.out_mask + token * Z.R + u[None, :], there, 0.0).to(tl.float32)
    to = made.outs + (n[:, None] * (T + 1) + t + 1) * Z.R + u[None, :]
    tl.store(to, out.to(made.outs.dtype.element_ty), there)


@triton.jit
def _tiles(KIND: tl.constexpr, N, S, Z: tl.constexpr):
    """The tiles of a phase."""
    if KIND == QUERY:
        tiles = tiles_of(N, Z.A, Z.blocks.n, Z.blocks.u)
    elif KIND == SCORE:
        tiles = N * tl.cdiv(S, Z.blocks.s)
    elif KIND <= CANDIDATE:
        tiles = tiles_of(N, Z.H, Z.blocks.n, Z.blocks.u)
    elif KIND == READ:
        tiles = tiles_of(N, Z.R, Z.blocks.n, Z.blocks.u)
    else:
        tiles = N * ((Z.D + Z.blocks.d - 1) // Z.blocks.d)
    return tiles


@triton.jit(do_not_specialize=["N", "T", "S", "COPIES", "t0", "t1", "p0", "p1"])
def decoder_forward(
    x, made, work, N, T, S, COPIES, t0, t1, p0, p1, Z: tl.constexpr, FORWARD: tl.constexpr, BARRIER: tl.constexpr
):
    """Phases [p0, p1) of steps [t0, t1). x: Read, made: Made, work: Work; COPIES: rows that read the same keys.

    Without BARRIER no phase may follow another in the launch.
    """
    arrived = 0
    rows = wide(N)
    steps = wide(T)
    for step in range(t0, t1):
        t = wide(step)
        for p in tl.static_range(len(Z.phases)):
            if (p >= p0) & (p < p1):
                kind: tl.constexpr = Z.phases[p][0]
                cell: tl.constexpr = Z.phases[p][1]
                for tile in range(tl.program_id(0), _tiles(kind, N, S, Z), tl.num_programs(0)):
                    if kind == CELL:
                        _cell(tile, x, made, work, cell, t, rows, steps, Z, FORWARD)
                    elif kind == RESET:
                        _reset(tile, x, made, work, cell, t, rows, steps, Z)
                    elif kind == CANDIDATE:
                        _candidate(tile, x, made, work, cell, t, rows, steps, Z)
                    elif kind == QUERY:
                        _query(tile, x, made, t, rows, steps, Z)
                    elif kind == SCORE:
                        _score(tile, x, made, work, t, rows, steps, S, COPIES, Z)
                    elif kind == READ:
                        _read(tile, x, made, t, rows, steps, Z)
                    else:
                        _context(tile, x, made, work, t, rows, steps, S, COPIES, Z)
                if BARRIER:
                    if (step + 1 < t1) | (p + 1 < p1):  # after the last the kernel ends
                        arrived += tl.num_programs(0)
                        wait_for_all(work.arrived, arrived)
