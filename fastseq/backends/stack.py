"""Layers stacked over one-layer kernels, with dropout between them drawn as torch.nn draws it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import RnnCall

__all__ = ["Layer", "run"]

# layer(cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional) -> (out, h_n, c_n | None)
# x as in RnnCall with a last dimension of stride 1; h0, c0 [D, B, ·] or None; weights of this layer's D directions;
# out in x's layout with D*P features; h_n, c_n [D, B, ·].
Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def run(call: RnnCall, layer: Layer, frozen: Sequence[Any] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`call` as `num_layers` calls of `layer`; frozen: one for each, which it takes as `frozen=`."""
    x = call.input
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    layers, dirs = call.num_layers, 2 if call.bidirectional else 1
    if layers == 1:
        out, h_n, c_n = _layer(call, layer, x, call.h0, call.c0, call.weights, frozen)
        return out, ((h_n,) if c_n is None else (h_n, c_n))
    per = len(call.weights) // layers
    finals: list[tuple[Tensor, Tensor | None]] = []
    for k in range(layers):
        if k and call.training and call.dropout:
            x = _dropout(x, call.dropout, call.batch_first and call.batch_sizes is None)
        h0 = None if call.h0 is None else call.h0[k * dirs : (k + 1) * dirs]
        c0 = None if call.c0 is None else call.c0[k * dirs : (k + 1) * dirs]
        x, h_n, c_n = _layer(call, layer, x, h0, c0, call.weights[k * per : (k + 1) * per], frozen, k)
        finals.append((h_n, c_n))
    h = torch.cat([h_n for h_n, _ in finals])
    c = [c_n for _, c_n in finals if c_n is not None]
    return x, ((h, torch.cat(c)) if c else (h,))


def _layer(
    call: RnnCall, layer: Layer, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor],
    frozen: Sequence[Any] | None, index: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    more = {} if frozen is None else {"frozen": frozen[index]}
    return layer(
        call.cell, x, h0, c0, weights, call.lengths, call.resets, call.batch_sizes, call.batch_first,
        call.bidirectional, **more,
    )  # fmt: skip


def _dropout(x: Tensor, p: float, batch_first: bool) -> Tensor:
    """torch.dropout with the draws of torch.nn, which runs time-major whatever the layout of its input."""
    if not batch_first or p == 1.0:
        return torch.dropout(x, p, True)
    noise = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).bernoulli_(1.0 - p).div_(1.0 - p)
    return x * noise.transpose(0, 1)
