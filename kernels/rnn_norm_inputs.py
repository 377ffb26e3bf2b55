"""N(W_ih x) of all steps at once, and its gradients: what of layer normalisation does not wait for the recurrence.

A program has some tokens and goes over their gates twice, once for what is summed and once for what is made of it.
"""

import triton
import triton.language as tl

from .blocks import zeros
from .rnn_norm_blocks import EPS, PER_TOKEN, joined

__all__ = ["backward_kernel", "forward_kernel"]

_SCALE = tl.constexpr(3)  # where a token's statistics have those of x


@triton.jit
def _normalise(
    values, stats, rows, rows_in, BLOCK: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of statistics: columns FIRST .. END - 1."""
    count = zeros(BLOCK_ROWS)
    mean = zeros(BLOCK_ROWS)
    squares = zeros(BLOCK_ROWS)
    for k0 in range(FIRST, END, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = rows_in[:, None] & (k < END)[None, :]
        part = tl.load(values + rows[:, None] * WIDTH + k[None, :], there, 0.0).to(tl.float32)
        more = zeros(BLOCK_ROWS) + tl.minimum(END - k0, BLOCK_K)
        of_part = tl.sum(part, 1) / more
        off = tl.where(there, part - of_part[:, None], 0.0)
        count, mean, squares = joined(count, mean, squares, more, of_part, tl.sum(off * off, 1))
    scale = 1 / tl.sqrt(squares / (END - FIRST) + EPS)
    if stats is not None:
        tl.store(stats + rows * PER_TOKEN + _SCALE + BLOCK, scale, rows_in)
    for k0 in range(FIRST, END, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = rows_in[:, None] & (k < END)[None, :]
        p = values + rows[:, None] * WIDTH + k[None, :]
        hats = (tl.load(p, there, 0.0).to(tl.float32) - mean[:, None]) * scale[:, None]
        tl.store(p, hats.to(values.dtype.element_ty), there)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    values,  # [tokens, G * H]: x W_ih'; becomes N of it
    stats,  # [tokens, STATS] fp32 or None
    tokens,
    GATES: tl.constexpr,
    SPLIT: tl.constexpr,  # gates of the first block of statistics
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_in = rows < tokens
    _normalise(values, stats, rows, rows_in, 0, 0, SPLIT * H, GATES * H, BLOCK_ROWS, BLOCK_K)
    if SPLIT < GATES:
        _normalise(values, stats, rows, rows_in, 1, SPLIT * H, GATES * H, GATES * H, BLOCK_ROWS, BLOCK_K)


@triton.jit
def _gradients(
    d_gates, gain_x, hats_x, stats, d_inputs, rows, rows_in, BLOCK: tl.constexpr, FIRST: tl.constexpr,
    END: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of statistics: columns FIRST .. END - 1."""
    plain = zeros(BLOCK_ROWS)
    by_hat = zeros(BLOCK_ROWS)
    for k0 in range(FIRST, END, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = rows_in[:, None] & (k < END)[None, :]
        d = tl.load(d_gates + rows[:, None] * PITCH + k[None, :], there, 0.0).to(tl.float32)
        d *= tl.load(gain_x + k, k < END, 0.0).to(tl.float32)[None, :]
        plain += tl.sum(d, 1)
        by_hat += tl.sum(d * tl.load(hats_x + rows[:, None] * WIDTH + k[None, :], there, 0.0).to(tl.float32), 1)
    plain = plain / (END - FIRST)
    by_hat = by_hat / (END - FIRST)
    scale = tl.load(stats + rows * PER_TOKEN + _SCALE + BLOCK, rows_in, 0.0)
    for k0 in range(FIRST, END, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        there = rows_in[:, None] & (k < END)[None, :]
        d = tl.load(d_gates + rows[:, None] * PITCH + k[None, :], there, 0.0).to(tl.float32)
        d *= tl.load(gain_x + k, k < END, 0.0).to(tl.float32)[None, :]
        hats = tl.load(hats_x + rows[:, None] * WIDTH + k[None, :], there, 0.0).to(tl.float32)
        d = (d - plain[:, None] - hats * by_hat[:, None]) * scale[:, None]
        tl.store(d_inputs + rows[:, None] * WIDTH + k[None, :], d.to(d_inputs.dtype.element_ty), there)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    d_gates,  # [tokens, COLUMNS, H]: those of x come first
    gain_x,  # [G * H]
    hats_x,  # [tokens, G * H]
    stats,  # [tokens, STATS] fp32
    d_inputs,  # [tokens, G * H]: of x W_ih'
    tokens,
    GATES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_in = rows < tokens
    width: tl.constexpr = GATES * H
    pitch: tl.constexpr = COLUMNS * H
    _gradients(
        d_gates, gain_x, hats_x, stats, d_inputs, rows, rows_in, 0, 0, SPLIT * H, width, pitch, BLOCK_ROWS, BLOCK_K
    )
    if SPLIT < GATES:
        _gradients(
            d_gates, gain_x, hats_x, stats, d_inputs, rows, rows_in, 1, SPLIT * H, width, width, pitch, BLOCK_ROWS,
            BLOCK_K,
        )  # fmt: skip
