"""One step in eager mode: what cells and T=1 layers call thousands of times a second, so every microsecond counts.

The kernels' own entry for it, without the schema of `rnn.py`; torch.compile, export and torch.func go there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..backends import reference
from .cells import CELLS
from .common import Kernels, address, gpu_kernels, needs_recording, saved_by, through_reference
from .packed import PACKED_PRODUCTS, PackedLayer

__all__ = ["StepShape", "rnn_step"]

_BF16 = torch.bfloat16


class StepShape(NamedTuple):
    """How a step's tensors are laid out."""

    cell: str  # "lstm" | "gru"
    rows: int  # B
    row: int  # stride of a row of x
    state: tuple[int, ...]  # shape of h and c: [B, H] with any 1s
    out: tuple[int, ...] | None  # a layer's output, memory of its own; None: a cell


def rnn_step(
    shape: StepShape,
    x: Tensor,  # B rows of I contiguous features
    h0: Tensor | None,  # contiguous, x's dtype, or on a GPU fp32; None: zeros
    c0: Tensor | None,
    weights: Sequence[Tensor],  # w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh), contiguous
    on: str = "cpu",
    frozen: PackedLayer | None = None,  # on the CPU only
) -> tuple[Tensor, ...]:
    """out (of a layer), h and, of an LSTM, c."""
    kernels = _NATIVE if on == "cpu" else gpu_kernels(on, "rnn_cell")
    if torch.is_grad_enabled():
        needs = [x.requires_grad, h0 is not None and h0.requires_grad, c0 is not None and c0.requires_grad, False]
        needs[3] = any(w.requires_grad for w in weights)
        if any(needs):
            return _RnnStep.apply(kernels, shape, needs, x, h0, c0, *weights)
    if frozen is not None and shape.rows * shape.state[-1] * (x.shape[-1] + shape.state[-1]) >= PACKED_PRODUCTS:
        return _forward(shape, x, h0, c0, weights, False, *frozen.packed(shape.cell, weights))[0]
    return kernels.forward(shape, x, h0, c0, weights, False)[0]


def _forward(
    shape: StepShape, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], save: bool,
    packed: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:  # fmt: skip
    """The results, then what backward reads: gates [B, 4, H] in x's dtype and an LSTM's cells [B, H] in fp32."""
    assert _native.C is not None
    cell, rows, row, state, out_shape = shape
    (number, _, columns, _, _, lstm), hidden = CELLS[cell], state[-1]
    h = x.new_empty(state) if h0 is None else torch.empty_like(h0)
    c = torch.empty_like(h) if lstm else None
    out = None if out_shape is None else x.new_empty(out_shape)
    gates = x.new_empty((rows, columns, hidden)) if save else None
    cells = x.new_empty((rows, hidden), dtype=torch.float32) if save and lstm else None
    _native.C.rnn_step(
        number, x.dtype is _BF16, rows, x.shape[-1], hidden, x.data_ptr(), row, *_weights(weights), address(h0),
        address(c0), address(out), h.data_ptr(), address(c), address(gates), address(cells), torch.get_num_threads(),
        address(packed),
    )  # fmt: skip
    results = (h,) if c is None else (h, c)
    return results if out is None else (out, *results), gates, cells


def _weights(weights: Sequence[Tensor | None]) -> list[int]:
    own = [0 if w is None else w.data_ptr() for w in weights]
    return own if len(own) == 4 else [*own, 0, 0]


def _backward(
    shape: StepShape, needs: Sequence[bool], grads: Sequence[Tensor | None], x: Tensor, h0: Tensor | None,
    c0: Tensor | None, weights: Sequence[Tensor], gates: Tensor, cells: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, h0, c0, then the weights; None for those not needed."""
    cell, rows, row, _, out_shape = shape
    dense = [None if g is None else g.contiguous() for g in grads]
    d_out = None if out_shape is None else dense.pop(0)
    d_h, d_c = dense if len(dense) == 2 else (dense[0], None)
    hidden = gates.shape[-1]
    d_x = x.new_empty(x.shape) if needs[0] else None
    d_h0 = torch.empty_like(h0) if needs[1] and h0 is not None else None
    d_c0 = torch.empty_like(c0) if needs[2] and c0 is not None else None
    d_weights = [torch.empty_like(w) if needs[3] else None for w in weights]
    _native.C.rnn_step_backward(  # type: ignore[union-attr]
        CELLS[cell].number, x.dtype is _BF16, rows, x.shape[-1], hidden, x.data_ptr(), row, *_weights(weights),
        address(h0), address(c0), address(d_out), hidden, address(d_h), address(d_c), gates.data_ptr(),
        address(cells), address(d_x), address(d_h0), address(d_c0), *_weights(d_weights), torch.get_num_threads(),
    )  # fmt: skip
    return [d_x, d_h0, d_c0, *d_weights]


_NATIVE = Kernels(_forward, _backward)


def _reference(
    shape: StepShape, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
) -> tuple[Tensor | None, ...]:
    """The same results by plain PyTorch."""
    h0, c0 = (None if s is None else s.reshape(1, shape.rows, -1) for s in (h0, c0))
    x = x.reshape(1, shape.rows, -1)
    out, h, c, _ = reference.layer(shape.cell, x, h0, c0, weights, None, None, None, False, False)
    results = (h.view(shape.state),) if c is None else (h.view(shape.state), c.view(shape.state))
    return results if shape.out is None else (out.reshape(shape.out), *results)


class _RnnStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, shape: StepShape, needs: list[bool], x: Tensor, h0: Any, c0: Any, *weights: Tensor
    ) -> Any:
        results, gates, cells = kernels.forward(shape, x, h0, c0, weights, True)
        ctx.save_for_backward(x, h0, c0, gates, cells, *weights)
        ctx.kernels, ctx.shape, ctx.needs = kernels, shape, needs
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, h0, c0, gates, cells, *weights = saved_by(ctx)
        if needs_recording(grads):
            return None, None, None, *through_reference(partial(_reference, ctx.shape), (x, h0, c0, *weights), grads)
        return None, None, None, *ctx.kernels.backward(ctx.shape, ctx.needs, grads, x, h0, c0, weights, gates, cells)
