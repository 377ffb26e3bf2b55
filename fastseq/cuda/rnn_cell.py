"""One step of a layer or a cell on the CUDA kernels, called as fastseq/ops/step.py calls its native twin.

Forward is one launch, csrc/cuda/rnn_step.h; backward is a layer's of one step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import rnn_gpu
from ..ops.cells import CELLS
from ..ops.extras import NONE
from . import native
from .native import KINDS, address, kind_of
from .rnn import Recurrence

__all__ = ["backward", "forward"]

_OF_CELLS = Recurrence("matmul")


def forward(
    shape: Any,  # a StepShape
    x: Tensor,  # B rows of I contiguous features, shape.row apart
    h0: Tensor | None,  # contiguous, in x's dtype or fp32; None: zeros
    c0: Tensor | None,
    weights: Sequence[Tensor],  # w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh), contiguous
    save: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """(out of a layer, h, c of an LSTM); for backward gates [B, 4, H], and an LSTM's cells [B, H] in fp32."""
    name, rows, row, state, _ = shape
    hidden = state[-1]
    made = rnn_gpu.StepResults.empty(shape, x, h0, save)
    if rows:
        w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
        native.launch(
            "rnn_step", x, KINDS[kind_of(x.dtype, rnn_gpu.tf32_flag("matmul"))], CELLS[name].number, rows, x.shape[-1],
            hidden, row, made.h.dtype is torch.float32, x.data_ptr(), address(w_ih), address(w_hh), address(b_ih),
            address(b_hh), address(h0), address(c0), address(made.out), *map(address, (*made[:2], *made[3:])),
        )  # fmt: skip
    return made.complete()


def backward(
    shape: Any,
    needs: Sequence[bool],  # x, h0, c0, weights
    grads: Sequence[Tensor | None],  # of forward's results
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    gates: Tensor,
    cells: Tensor | None,
) -> list[Tensor | None]:
    """d_x, d_h0, d_c0, then one a weight; None for those not needed."""
    name, rows, _, state, out_shape = shape
    given = [None if g is None else g.reshape(1, rows, state[-1]) for g in grads]
    d_out = None if out_shape is None else given.pop(0)
    d_h, d_c = (*given, None)[:2]
    of_layer = (1, rows, state[-1])
    h, c = (None if s is None else s.reshape(of_layer) for s in (h0, c0))
    found = rnn_gpu.backward(
        _OF_CELLS, name, d_out, d_h, d_c, None, x.reshape(1, rows, x.shape[-1]), h, c, weights, None, None, None, False,
        False, x.new_empty(0), gates[None], None if cells is None else cells[None], needs, NONE,
    )  # fmt: skip
    of_inputs = [
        d.view(t.shape) if t is not None and need else None
        for d, t, need in zip(found[:3], (x, h0, c0), needs[:3], strict=True)
    ]
    return [*of_inputs, *(found[3:] if needs[3] else [None] * len(weights))]
