"""Layers stacked over one-layer kernels, with dropout between them drawn as torch.nn draws it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.extras import NONE, Extras
from .call import Results, RnnCall

__all__ = ["Layer", "run"]

STATES = Extras(states=True)

# layer(cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, extras)
# -> (out, h_n, c_n | None, c_out | None)
# With norms= of this layer's D directions where the call is layer-normalised.
# x as in RnnCall with a last dimension of stride 1; h0, c0 [D, B, ·] or None; weights of this layer's D directions;
# out, c_out in x's layout with D*P and D*H features; h_n, c_n [D, B, ·].
Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def run(call: RnnCall, layer: Layer, frozen: Sequence[Any] | None = None) -> Results:
    """`call` as `num_layers` calls of `layer`; frozen: one for each, which it takes as `frozen=`."""
    x = call.input
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    layers, dirs = call.num_layers, 2 if call.bidirectional else 1
    if layers == 1:
        out, h_n, c_n, c_out = _layer(call, layer, x, call.h0, call.c0, call.weights, frozen)
        return _results(call, out, ((h_n,) if c_n is None else (h_n, c_n)), c_out)
    per = len(call.weights) // layers
    finals: list[tuple[Tensor, Tensor | None]] = []
    for k in range(layers):
        if k and call.training and call.dropout:
            x = _dropout(x, call.dropout, call.batch_first and call.batch_sizes is None)
        h0 = None if call.h0 is None else call.h0[k * dirs : (k + 1) * dirs]
        c0 = None if call.c0 is None else call.c0[k * dirs : (k + 1) * dirs]
        x, h_n, c_n, c_out = _layer(call, layer, x, h0, c0, call.weights[k * per : (k + 1) * per], frozen, k)
        finals.append((h_n, c_n))
    h = torch.cat([h_n for h_n, _ in finals])
    c = [c_n for _, c_n in finals if c_n is not None]
    return _results(call, x, ((h, torch.cat(c)) if c else (h,)), c_out)


def _results(call: RnnCall, out: Tensor, state: tuple[Tensor, ...], c_out: Tensor | None) -> Results:
    return (out, state, c_out) if call.states else (out, state)


def _layer(
    call: RnnCall, layer: Layer, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor],
    frozen: Sequence[Any] | None, index: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    more: dict[str, Any] = {} if frozen is None else {"frozen": frozen[index]}
    if call.norms is not None:
        per = len(call.norms) // call.num_layers
        more["norms"] = call.norms[index * per : (index + 1) * per]
    return layer(
        call.cell, x, h0, c0, weights, call.lengths, call.resets, call.batch_sizes, call.batch_first,
        call.bidirectional, _extras(call, x, index), **more,
    )  # fmt: skip


def _extras(call: RnnCall, x: Tensor, index: int) -> Extras:
    """Of layer `index`; every cell state is the last layer's, as the output is."""
    states = call.states and index == call.num_layers - 1
    if call.noise is None:
        return STATES if states else NONE
    return call.noise.drawn(
        x, call.batch, 2 if call.bidirectional else 1, call.hidden_size, call.proj_size or call.hidden_size,
        call.cell == "lstm", call.training, states,
    )  # fmt: skip


def _dropout(x: Tensor, p: float, batch_first: bool) -> Tensor:
    """torch.dropout with the draws of torch.nn, which runs time-major whatever the layout of its input."""
    if not batch_first or p == 1.0:
        return torch.dropout(x, p, True)
    noise = x.new_empty(x.shape[1], x.shape[0], x.shape[2]).bernoulli_(1.0 - p).div_(1.0 - p)
    return x * noise.transpose(0, 1)
