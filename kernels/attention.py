"""Fused attention of all queries of a sequence: nothing of [queries, S, A] is ever stored. Its gradients stand in
attention_backward.py.

Queries of one memory row stand together, q [N, T, A] = [B, M, A] with M = k T. One kernel makes the scores, each
program a tile of [M, S]; the next their softmax and the contexts, each program a tile of [M, D]. Between them lie the
scores, fp32 [B, M, S]: so a small batch has programs enough, no tanh is computed twice however large D is, and neither
kernel needs more registers than its own tile. Everything computed is fp32; results have q's dtype.

What stands behind mask False is never read into a result. Letters: B memory rows, M queries a row, S positions,
A units, D features.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .attention_backward import backward, key_gradients
from .attention_scores import masked_scores
from .blocks import dot
from .launch import Launch
from .scores import as_bytes, attended_of, fitted

__all__ = ["backward", "forward", "key_gradients"]


@triton.jit(do_not_specialize=["saved", "M", "S"])
def attention_context_kernel(
    scores,  # fp32 [B, M, S], -inf behind the mask
    memory,  # [B, S, D]
    mask,  # uint8 [B, S] or None
    context,  # [B, M, D]
    weights,  # [B, M, S]
    saved,  # whether to store the weights: a number of the run, so that training and inference are one compilation
    M,
    S,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax over the positions, and its product with the memory by an online softmax. The first block of features
    stores the weights."""
    blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows_in, features_in = rows < M, features < D
    at = (b * M + rows)[:, None]  # int64, as b is
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for s0 in range(0, S, BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        attended = attended_of(mask, b, positions, S)
        there = rows_in[:, None] & attended[None, :]
        tile = tl.load(scores + at * S + positions[None, :], there, float("-inf"))
        values = tl.load(
            memory + (b * S + positions)[:, None] * D + features[None, :],
            attended[:, None] & features_in[None, :],
            0.0,
        )
        higher = tl.maximum(top, tl.max(tile, 1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # nothing attended to yet: -inf - -inf is NaN
        shrink = tl.exp(top - origin)
        p = tl.exp(tile - origin[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        top = higher
    scale = 1 / tl.where(total == 0, 1.0, total)  # of a row with nothing to attend to all sums are 0
    tl.store(
        context + at * D + features[None, :],
        (acc * scale[:, None]).to(context.dtype.element_ty),
        rows_in[:, None] & features_in[None, :],
    )
    origin = tl.where(top == float("-inf"), 0.0, top)
    for s0 in range(0, tl.where((saved != 0) & (tl.program_id(1) == 0), S, 0), BLOCK_S):
        positions = s0 + tl.arange(0, BLOCK_S)
        there = rows_in[:, None] & (positions < S)[None, :]
        tile = tl.load(scores + at * S + positions[None, :], there, float("-inf"))
        weight = tl.where(tile == float("-inf"), 0.0, tl.exp(tile - origin[:, None]) * scale[:, None])
        tl.store(weights + at * S + positions[None, :], weight.to(weights.dtype.element_ty), there)


def forward(
    q: Tensor,  # [N, T, A], projected; N = B * k, row n reads memory row n // k
    keys: Tensor,  # [B, S, A]
    memory: Tensor,  # [B, S, D]
    mask: Tensor | None,  # [B, S] bool, True = attend
    v: Tensor | None,  # [A] of the additive form; None: the dot form
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Context [N, T, D] and weights [N, T, S], those empty unless `save`; in q's dtype."""
    (rows, steps, units), (batch, source, features) = q.shape, memory.shape
    queries = rows * steps // max(batch, 1)
    context = q.new_empty((rows, steps, features))
    weights = q.new_empty((rows, steps, source) if save else 0)
    if context.numel():
        q, keys, memory = (launch.aligned(t) for t in (q, keys, memory))
        v, mask = None if v is None else launch.aligned(v), as_bytes(mask)
        scores = masked_scores(q.view(batch, queries, units), keys, mask, v)
        config = configs.choose("attention_context", q.dtype, features, launch.device_of(q))
        constants: dict[str, Any] = {"D": features} | config.constants
        constants["BLOCK_D"] = fitted(constants["BLOCK_D"], features)
        constants["PRECISION"] = launch.precision(q.dtype, launch.tf32_allowed(q, "matmul"))
        args = (scores, memory, mask, context, weights if save else context, int(save), queries, source)
        grid = (batch * launch.cdiv(queries, constants["BLOCK_M"]), launch.cdiv(features, constants["BLOCK_D"]))
        launch.run(q, Launch(attention_context_kernel, grid, args, constants, config.warps, config.stages))
    return context, weights
