"""Gradients of the fused attention, without atomics: the same bits every time. Letters as in attention.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .blocks import dot
from .launch import Launch
from .scores import additive_backward, as_bytes, attended_of, fast_tanh, fitted, reach_of

__all__ = ["backward", "key_gradients"]


@triton.jit(do_not_specialize=["M", "S"])
def attention_weights_backward_kernel(
    d_context,  # [B, M, D] or None
    d_weights,  # [B, M, S] or None
    memory,  # [B, S, D], not read behind the mask
    weights,  # [B, M, S]
    mask,  # uint8 [B, S] or None
    d_scores,  # fp32 [B, M, S]
    M,
    S,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of scores: w (dw - sum of w dw), dw = d_context memory^T + d_weights. Exactly 0 behind the mask.

    A program has whole rows: dw stands in d_scores until their sums are known.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in = rows < M
    at = b * M + rows  # int64, as b is
    inner = tl.zeros((BLOCK_M,), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        attended = attended_of(mask, b, positions, S)
        there = rows_in[:, None] & attended[None, :]
        tile = at[:, None] * S + positions[None, :]
        d = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
        if d_context is not None:
            for d0 in range(0, D, BLOCK_D):
                features = d0 + tl.arange(0, BLOCK_D)
                features_in = features < D
                of_rows = tl.load(
                    d_context + at[:, None] * D + features[None, :], rows_in[:, None] & features_in[None, :], 0.0
                )
                of_memory = tl.load(
                    memory + (b * S + positions)[None, :] * D + features[:, None],
                    attended[None, :] & features_in[:, None],
                    0.0,
                )
                d = dot(of_rows, of_memory, d, PRECISION)
        if d_weights is not None:
            d += tl.load(d_weights + tile, there, 0.0).to(tl.float32)
        weight = tl.load(weights + tile, there, 0.0).to(tl.float32)
        inner += tl.sum(tl.where(there, weight * d, 0.0), 1)
        tl.store(d_scores + tile, d, there)
    tl.debug_barrier()  # what other threads of this program stored
    for s0 in range(0, S, BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        there = rows_in[:, None] & attended_of(mask, b, positions, S)[None, :]
        tile = at[:, None] * S + positions[None, :]
        weight = tl.load(weights + tile, there, 0.0).to(tl.float32)
        d = weight * (tl.load(d_scores + tile, there, 0.0) - inner[:, None])
        tl.store(d_scores + tile, tl.where(there, d, 0.0), rows_in[:, None] & (positions < S)[None, :])


@triton.jit
def _pairs(
    own,  # [B, P, A]
    other,  # [B, J, A]
    d_scores,  # fp32 [B, J, P] where own are the keys, [B, P, J] where they are the queries
    v,  # [A]
    d_own,  # [B, P, A]
    d_v,  # fp32 [B * blocks of P, A]: a program's part, of those of the keys
    mask,  # uint8 [B, S]: what is 0 has d_score 0; or None
    i_block, P, J, A: tl.constexpr, OF_KEYS: tl.constexpr, FAST_TANH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """d_own[p] = sum over j, in their order, of d_score[p, j] d score(own[p], other[j]) / d own[p]."""
    blocks = tl.cdiv(P, BLOCK_P)
    b = (i_block // blocks).to(tl.int64)
    rows = (i_block % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    units = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    rows_in, units_in = rows < P, units < A
    at = (b * P + rows)[:, None] * A + units[None, :]  # int64, as b is
    tile_in = rows_in[:, None] & units_in[None, :]
    mine = tl.load(own + at, tile_in, 0.0).to(tl.float32)
    d_mine = tl.zeros((BLOCK_P, BLOCK_A), tl.float32)
    d_unit = tl.zeros((BLOCK_P, BLOCK_A), tl.float32)
    last = J  # padding costs nothing
    if mask is not None:
        last = J * tl.max(attended_of(mask, b, rows, P).to(tl.int32), 0) if OF_KEYS else reach_of(mask, b, J, BLOCK_A)
    for j0 in range(0, last, BLOCK_J):
        for i in tl.static_range(BLOCK_J):
            j = b * J + (j0 + i)
            there = j0 + i < J
            theirs = tl.load(other + j * A + units, units_in & there, 0.0).to(tl.float32)
            where = j * P + rows if OF_KEYS else (b * P + rows) * J + (j0 + i)
            d = tl.load(d_scores + where, rows_in & there, 0.0)
            d_sum, d_factor = additive_backward(mine, theirs[None, :], d[:, None], FAST_TANH)
            d_mine += d_sum
            d_unit += d_factor
    factor = tl.load(v + units, units_in, 0.0).to(tl.float32)
    tl.store(d_own + at, (d_mine * factor[None, :]).to(d_own.dtype.element_ty), tile_in)
    if OF_KEYS:
        tl.store(d_v + i_block.to(tl.int64) * A + units, tl.sum(d_unit, 0), units_in)


@triton.jit(do_not_specialize=["of_queries", "M", "S"])
def attention_pairs_kernel(
    q,  # [B, M, A]
    keys,  # [B, S, A]
    d_scores,  # fp32 [B, M, S]
    v,  # [A]
    d_q,  # [B, M, A]
    d_keys,  # [B, S, A]
    d_v,  # fp32 [B * blocks of S, A]: parts
    mask,  # uint8 [B, S]: what is 0 has d_score 0; or None
    of_queries,  # how many blocks of rows, the first, are of d_q; the others are of d_keys
    M,
    S,
    A: tl.constexpr,
    FAST_TANH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Gradients of queries, keys and v of the additive score."""
    block = tl.program_id(0)
    if block < of_queries:
        _pairs(
            q, keys, d_scores, v, d_q, d_v, mask, block, M, S, A, False, FAST_TANH, BLOCK_P, BLOCK_A, BLOCK_J
        )  # fmt: skip
    else:
        _pairs(
            keys, q, d_scores, v, d_keys, d_v, mask, block - of_queries, S, M, A, True, FAST_TANH, BLOCK_P, BLOCK_A,
            BLOCK_J,
        )  # fmt: skip


def _pair_gradients(
    q: Tensor,  # [B, M, A]
    keys: Tensor,  # [B, S, A]
    d_scores: Tensor,  # fp32 [B, M, S]
    v: Tensor,  # [A]
    mask: Tensor | None,  # uint8 [B, S]
    d_q: Tensor | None,  # [B, M, A], to be filled; None: nobody wants it
    d_keys: Tensor,  # [B, S, A], to be filled
) -> Tensor:
    """Fills the gradients, and returns v's, fp32."""
    (batch, queries, units), source = q.shape, keys.shape[1]
    device = launch.device_of(q)
    config = configs.choose("attention_pairs", q.dtype, units, device)
    constants = {"A": units, "FAST_TANH": fast_tanh(q.dtype, device)} | config.constants
    constants["BLOCK_A"] = fitted(constants["BLOCK_A"], units)
    of_queries = 0 if d_q is None else batch * launch.cdiv(queries, constants["BLOCK_P"])
    of_keys = batch * launch.cdiv(source, constants["BLOCK_P"])
    d_v = q.new_empty((of_keys, units), dtype=torch.float32)
    if of_queries + of_keys:
        args = (q, keys, d_scores, v, d_keys if d_q is None else d_q, d_keys, d_v, mask, of_queries, queries, source)
        grid = (of_queries + of_keys, launch.cdiv(units, constants["BLOCK_A"]))
        launch.run(q, Launch(attention_pairs_kernel, grid, args, constants, config.warps, config.stages))
    return d_v.sum(0)


def key_gradients(
    q: Tensor,  # [N, T, A], projected; N = B * k, row n asked keys n // k
    keys: Tensor,  # [B, S, A]; what d_scores is 0 for is not read into a result
    v: Tensor,  # [A]
    d_scores: Tensor,  # fp32 [N, T, S]
    mask: Tensor | None = None,  # [B, S] bool: d_scores is 0 where it is False, which spares work
) -> tuple[Tensor, Tensor]:
    """d_keys [B, S, A] and d_v [A] of the additive score, fp32, in a fixed order: without atomics."""
    q, keys, v, d_scores = (launch.aligned(t) for t in (q, keys, v, d_scores))
    batch, source, units = keys.shape
    queries = q.shape[0] * q.shape[1] // max(batch, 1)
    q, d_scores = q.view(batch, queries, units), d_scores.view(batch, queries, source)
    d_keys = torch.empty_like(keys, dtype=torch.float32)
    return d_keys, _pair_gradients(q, keys, d_scores, v, as_bytes(mask), None, d_keys)


def backward(
    d_context: Tensor | None,  # [N, T, D]
    d_weights: Tensor | None,  # [N, T, S]
    q: Tensor,
    keys: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    v: Tensor | None,
    weights: Tensor,  # [N, T, S]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, keys, memory and v (empty for the dot form); the other arguments are those of `forward`."""
    shape, (batch, source, _) = q.shape, memory.shape
    queries = shape[0] * shape[1] // max(batch, 1)
    q, keys, memory, weights = (launch.aligned(t) for t in (q, keys, memory, weights))
    q, weights = q.view(batch, queries, shape[2]), weights.view(batch, queries, source)
    d_context, d_weights = (
        None if d is None else launch.aligned(d).view(batch, queries, d.shape[2]) for d in (d_context, d_weights)
    )
    hidden = as_bytes(mask)
    d_scores = _score_gradients(d_context, d_weights, memory, hidden, weights)
    with torch.autocast(q.device.type, enabled=False):  # these products have the inputs' dtype
        seen = None if d_context is None else weights.transpose(1, 2) @ d_context
        d_memory = torch.zeros_like(memory) if seen is None else _masked(seen, mask)
        if v is None:
            low = d_scores.to(q.dtype)
            d_q, d_keys = low @ _masked(keys, mask), _masked(low.transpose(1, 2) @ q, mask)
            return d_q.view(shape), d_keys, d_memory, q.new_empty(0)
    v = launch.aligned(v)
    d_q, d_keys = torch.empty_like(q), torch.empty_like(keys)
    d_v = _pair_gradients(q, keys, d_scores, v, hidden, d_q, d_keys)
    return d_q.view(shape), d_keys, d_memory, d_v.to(v.dtype)


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, .] with 0 behind the mask, where it may hold NaN."""
    return rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0.0)


def _score_gradients(
    d_context: Tensor | None, d_weights: Tensor | None, memory: Tensor, mask: Tensor | None, weights: Tensor
) -> Tensor:
    """fp32 [B, M, S]; mask uint8 [B, S], d_context [B, M, D], d_weights and weights [B, M, S]."""
    batch, queries, source = weights.shape
    d_scores = torch.empty_like(weights, dtype=torch.float32)
    if d_scores.numel():
        features = memory.shape[2]
        config = configs.choose("attention_weights_backward", weights.dtype, features, launch.device_of(weights))
        constants: dict[str, Any] = {"D": features} | config.constants
        constants["BLOCK_D"] = fitted(constants["BLOCK_D"], features)
        constants["PRECISION"] = launch.precision(weights.dtype, launch.tf32_allowed(weights, "matmul"))
        args = (d_context, d_weights, memory, weights, mask, d_scores, queries, source)
        grid = (batch * launch.cdiv(queries, constants["BLOCK_M"]),)
        launch.run(
            weights,
            Launch(attention_weights_backward_kernel, grid, args, constants, config.warps, config.stages),
        )
    return d_scores
