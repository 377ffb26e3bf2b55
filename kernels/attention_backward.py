"""Gradients of the fused attention, without atomics: the same bits every time. Letters as in attention.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .attention_scores import masked_scores
from .launch import Launch
from .scores import additive_backward, as_bytes, attended_of, fast_tanh, fitted, reach_of

__all__ = ["backward", "key_gradients"]


@triton.jit(do_not_specialize=["M", "S"])
def attention_softmax_backward_kernel(
    seen,  # fp32 [B, M, S]: d_context memory^T, anything behind the mask; or None
    d_weights,  # [B, M, S] or None
    weights,  # [B, M, S]
    mask,  # uint8 [B, S] or None
    d_scores,  # fp32 [B, M, S]
    M,
    S,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradients of scores: w (dw - sum of w dw), dw = seen + d_weights. Exactly 0 behind the mask."""
    blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in = rows < M
    at = (b * M + rows)[:, None] * S  # int64, as b is
    inner = tl.zeros((BLOCK_M,), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        there = rows_in[:, None] & attended_of(mask, b, positions, S)[None, :]
        weight, d = _weight_and_gradient(seen, d_weights, weights, at + positions[None, :], there)
        inner += tl.sum(weight * d, 1)
    for s0 in range(0, S, BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        there = rows_in[:, None] & attended_of(mask, b, positions, S)[None, :]
        weight, d = _weight_and_gradient(seen, d_weights, weights, at + positions[None, :], there)
        d = tl.where(there, weight * (d - inner[:, None]), 0.0)
        tl.store(d_scores + at + positions[None, :], d, rows_in[:, None] & (positions < S)[None, :])


@triton.jit
def _weight_and_gradient(seen, d_weights, weights, at, there):
    """A tile of weights and one of their gradients, 0 where not `there`."""
    weight = tl.load(weights + at, there, 0.0).to(tl.float32)
    d = tl.zeros_like(weight)
    if seen is not None:
        d += tl.load(seen + at, there, 0.0)
    if d_weights is not None:
        d += tl.load(d_weights + at, there, 0.0).to(tl.float32)
    return weight, d


@triton.jit(do_not_specialize=["P", "J"])
def attention_pairs_kernel(
    own,  # [B, P, A]
    other,  # [B, J, A]
    d_scores,  # fp32 [B, J, P] where own are the keys, [B, P, J] where they are the queries
    v,  # [A]
    d_own,  # [B, P, A]
    d_v,  # fp32 [B * blocks of P, A]: a program's part; or None
    mask,  # uint8 [B, S]: what is 0 has d_score 0; or None
    P,
    J,
    A: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BACKWARD: tl.constexpr,  # additive_backward
    FAST_TANH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """d_own[p] = sum over j, in their order, of d_score[p, j] d score(own[p], other[j]) / d own[p]."""
    blocks = tl.cdiv(P, BLOCK_P)
    i_block = tl.program_id(0)
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
            d_sum, d_factor = BACKWARD(mine, theirs[None, :], d[:, None], FAST_TANH)
            d_mine += d_sum
            d_unit += d_factor
    factor = tl.load(v + units, units_in, 0.0).to(tl.float32)
    tl.store(d_own + at, (d_mine * factor[None, :]).to(d_own.dtype.element_ty), tile_in)
    if d_v is not None:
        tl.store(d_v + i_block.to(tl.int64) * A + units, tl.sum(d_unit, 0), units_in)


def _pair_gradients(
    own: Tensor,  # [B, P, A]
    other: Tensor,  # [B, J, A]
    d_scores: Tensor,  # fp32 [B, J, P] if of_keys, else [B, P, J]
    v: Tensor,  # [A]
    of_keys: bool,
    mask: Tensor | None,  # uint8 [B, S]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of `own` in `dtype`, and, beside those of the keys, of v in fp32; otherwise an empty tensor."""
    batch, rows, units = own.shape
    device = launch.device_of(own)
    config = configs.choose("attention_pairs", own.dtype, units, device)
    constants = {
        "A": units, "OF_KEYS": of_keys, "BACKWARD": additive_backward, "FAST_TANH": fast_tanh(own.dtype, device)
    } | config.constants  # fmt: skip
    constants["BLOCK_A"] = fitted(constants["BLOCK_A"], units)
    blocks = batch * launch.cdiv(rows, constants["BLOCK_P"])
    d_own = own.new_empty(own.shape, dtype=dtype)
    d_v = own.new_empty((blocks if of_keys else 0, units), dtype=torch.float32)
    if blocks:
        args = (own, other, d_scores, v, d_own, d_v if of_keys else None, mask, rows, other.shape[1])
        grid = (blocks, launch.cdiv(units, constants["BLOCK_A"]))
        launch.run(own, Launch(attention_pairs_kernel, grid, args, constants, config.warps, config.stages))
    return d_own, d_v.sum(0) if of_keys else d_v


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
    return _pair_gradients(keys, q, d_scores, v, True, as_bytes(mask), torch.float32)


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
    d_q, _ = _pair_gradients(q, keys, d_scores, v, False, hidden, q.dtype)
    d_keys, d_v = _pair_gradients(keys, q, d_scores, v, True, hidden, q.dtype)
    return d_q.view(shape), d_keys, d_memory, d_v.to(v.dtype)


def _masked(rows: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, .] with 0 behind the mask, where it may hold NaN."""
    return rows if mask is None else torch.where(mask.unsqueeze(-1), rows, 0.0)


def _score_gradients(
    d_context: Tensor | None, d_weights: Tensor | None, memory: Tensor, mask: Tensor | None, weights: Tensor
) -> Tensor:
    """fp32 [B, M, S]; mask uint8 [B, S], d_context [B, M, D], d_weights and weights [B, M, S]."""
    batch, queries, source = weights.shape
    seen = None if d_context is None else masked_scores(d_context, memory, mask, None)
    d_scores = torch.empty_like(weights, dtype=torch.float32)
    if d_scores.numel():
        config = configs.choose("attention_softmax_backward", weights.dtype, memory.shape[2], launch.device_of(weights))
        args = (seen, d_weights, weights, mask, d_scores, queries, source)
        grid = (batch * launch.cdiv(queries, config.blocks["m"]),)
        launch.run(
            weights,
            Launch(attention_softmax_backward_kernel, grid, args, config.constants, config.warps, config.stages),
        )
    return d_scores
