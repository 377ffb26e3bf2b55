"""Scores of tiles of queries and positions, in either form.

Letters as in attention.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .blocks import dot
from .launch import Launch
from .scores import additive, attended_of, fast_tanh, fitted

__all__ = ["masked_scores"]

FEW = 4  # queries of a memory row, as a caller's loop of single steps has them: not worth turning the keys for


@triton.jit
def additive_tile(
    q,  # [B, A, M], rows padded to blocks
    keys,  # [B, A, S], rows padded to blocks
    v,  # [A]
    b,
    rows,
    positions,
    rows_in,
    attended,
    M,
    S,
    A: tl.constexpr,
    FAST_TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Scores [BLOCK_M, BLOCK_S], unit by unit: sums stay in their threads. The pads are read, whatever they hold."""
    tile = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    pitch_m = tl.cdiv(M, BLOCK_M) * BLOCK_M
    pitch_s = tl.cdiv(S, BLOCK_S) * BLOCK_S
    some = tl.max(attended.to(tl.int32), 0) * A  # a block of padding costs nothing
    for a0 in range(0, some, BLOCK_A):
        for i in tl.static_range(BLOCK_A):
            a = b * A + (a0 + i)
            query = tl.load(q + a * pitch_m + rows).to(tl.float32)
            key = tl.load(keys + a * pitch_s + positions).to(tl.float32)
            factor = tl.load(v + (a0 + i)).to(tl.float32)
            tile += additive(key[None, :], query[:, None], factor, FAST_TANH)
    return tile


@triton.jit
def additive_row(
    q,  # [B, M, A]
    keys,  # [B, S, A]
    v,  # [A]
    b,
    rows,
    positions,
    rows_in,
    attended,
    M,
    S,
    A: tl.constexpr,
    FAST_TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 1
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Scores [1, BLOCK_S] from the keys as they lie, summed over threads once: few queries do not pay for more."""
    sums = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    some = tl.max(attended.to(tl.int32), 0) * A
    for a0 in range(0, some, BLOCK_A):
        units = a0 + tl.arange(0, BLOCK_A)
        units_in = units < A
        query = tl.load(q + (b * M + rows)[:, None] * A + units[None, :], units_in[None, :], 0.0).to(tl.float32)
        at = (b * S + positions)[:, None] * A + units[None, :]
        key = tl.load(keys + at, attended[:, None] & units_in[None, :], 0.0).to(tl.float32)
        factor = tl.load(v + units, units_in, 0.0).to(tl.float32)
        sums += additive(key, query, factor[None, :], FAST_TANH)
    return tl.sum(sums, 1)[None, :]


@triton.jit
def dot_tile(
    q,  # [B, M, A]
    keys,  # [B, S, A]
    v,
    b,
    rows,
    positions,
    rows_in,
    attended,
    M,
    S,
    A: tl.constexpr,
    FAST_TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Scores [BLOCK_M, BLOCK_S]: q keys^T."""
    tile = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for a0 in range(0, A, BLOCK_A):
        units = a0 + tl.arange(0, BLOCK_A)
        units_in = units < A
        query = tl.load(q + (b * M + rows)[:, None] * A + units[None, :], rows_in[:, None] & units_in[None, :], 0.0)
        key = tl.load(
            keys + (b * S + positions)[None, :] * A + units[:, None], attended[None, :] & units_in[:, None], 0.0
        )
        tile = dot(query, key, tile, PRECISION)
    return tile


@triton.jit
def _store_scores(
    TILE: tl.constexpr,  # additive_tile | additive_row | dot_tile
    q, keys, v,  # as TILE reads them
    mask,  # uint8 [B, S] or None
    scores,  # fp32 [B, M, S]
    M, S, A: tl.constexpr, FAST_TANH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """This program's tile of scores, -inf behind the mask."""
    across, blocks = tl.cdiv(S, BLOCK_S), tl.cdiv(M, BLOCK_M)
    block = tl.program_id(0) // across
    b = (block // blocks).to(tl.int64)
    rows = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = (tl.program_id(0) % across) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows_in = rows < M
    attended = attended_of(mask, b, positions, S)
    tile = TILE(
        q, keys, v, b, rows, positions, rows_in, attended, M, S, A, FAST_TANH, PRECISION, BLOCK_M, BLOCK_S, BLOCK_A
    )
    tile = tl.where(attended[None, :], tile, float("-inf"))
    at = (b * M + rows)[:, None] * S + positions[None, :]  # int64, as b is
    tl.store(scores + at, tile, rows_in[:, None] & (positions < S)[None, :])


@triton.jit(do_not_specialize=["M", "S"])
def attention_additive_kernel(
    q,  # [B, A, M], rows padded to blocks; few of them: [B, M, A]
    keys,  # [B, A, S], rows padded to blocks; beside few queries: [B, S, A]
    v,  # [A]
    mask,  # uint8 [B, S] or None
    scores,  # fp32 [B, M, S]
    M,
    S,
    A: tl.constexpr,
    FEW: tl.constexpr,
    FAST_TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_FEW_S: tl.constexpr,
    BLOCK_FEW_A: tl.constexpr,
):
    """Additive scores of any number of queries: one compilation, whose programs all take the same of two ways."""
    if M <= FEW:
        _store_scores(
            additive_row, q, keys, v, mask, scores, M, S, A, FAST_TANH, None, 1, BLOCK_FEW_S, BLOCK_FEW_A
        )  # fmt: skip
    else:
        _store_scores(
            additive_tile, q, keys, v, mask, scores, M, S, A, FAST_TANH, None, BLOCK_M, BLOCK_S, BLOCK_A
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "S"])
def attention_dot_kernel(
    q,  # [B, M, A]
    keys,  # [B, S, A]
    mask,  # uint8 [B, S] or None
    scores,  # fp32 [B, M, S]
    M,
    S,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Scores of the dot form."""
    _store_scores(dot_tile, q, keys, None, mask, scores, M, S, A, False, PRECISION, BLOCK_M, BLOCK_S, BLOCK_A)


def masked_scores(
    q: Tensor,  # [B, M, A]
    keys: Tensor,  # [B, S, A]
    mask: Tensor | None,  # uint8 [B, S]
    v: Tensor | None,  # [A] of the additive form; None: the dot form
) -> Tensor:
    """fp32 [B, M, S], -inf behind the mask."""
    scores = q.new_empty((*q.shape[:2], keys.shape[1]), dtype=torch.float32)
    if scores.numel():
        one = _dot(q, keys, mask, scores) if v is None else _additive(q, keys, v, mask, scores)
        launch.run(q, one)
    return scores


def _additive(q: Tensor, keys: Tensor, v: Tensor, mask: Tensor | None, scores: Tensor) -> Launch:
    (batch, queries, units), source = q.shape, keys.shape[1]
    device = launch.device_of(q)
    config = configs.choose("attention_additive", q.dtype, units, device)
    blocks = config.constants
    blocks["BLOCK_A"] = math.gcd(blocks["BLOCK_A"], units)
    blocks["BLOCK_FEW_A"] = fitted(blocks["BLOCK_FEW_A"], units)
    few = queries <= FEW
    if not few:
        q, keys = _by_unit(q, blocks["BLOCK_M"]), _by_unit(keys, blocks["BLOCK_S"])
    rows, positions = (1, blocks["BLOCK_FEW_S"]) if few else (blocks["BLOCK_M"], blocks["BLOCK_S"])
    constants = {"A": units, "FEW": FEW, "FAST_TANH": fast_tanh(q.dtype, device)} | blocks
    grid = (batch * launch.cdiv(queries, rows) * launch.cdiv(source, positions),)
    args = (q, keys, v, mask, scores, queries, source)
    return Launch(attention_additive_kernel, grid, args, constants, config.warps, config.stages)


def _dot(q: Tensor, keys: Tensor, mask: Tensor | None, scores: Tensor) -> Launch:
    (batch, queries, units), source = q.shape, keys.shape[1]
    config = configs.choose("attention_dot", q.dtype, units, launch.device_of(q))
    blocks = config.constants
    blocks["BLOCK_A"] = fitted(blocks["BLOCK_A"], units)
    precision = launch.precision(q.dtype, launch.tf32_allowed(q, "matmul"))
    constants = {"A": units, "PRECISION": precision} | blocks
    grid = (batch * launch.cdiv(queries, blocks["BLOCK_M"]) * launch.cdiv(source, blocks["BLOCK_S"]),)
    args = (q, keys, mask, scores, queries, source)
    return Launch(attention_dot_kernel, grid, args, constants, config.warps, config.stages)


def _by_unit(t: Tensor, block: int) -> Tensor:
    """[B, R, A] as [B, A, R padded to blocks]; the pads are not set."""
    batch, rows, units = t.shape
    turned = t.new_empty((batch, units, launch.cdiv(rows, block) * block))
    torch.ops.aten.copy_(turned.narrow(2, 0, rows), t.transpose(1, 2))  # the method asks CUDA, of fake tensors too
    return turned
