"""One recurrent layer on the CUDA kernels: the schemas `rnn_forward` and `rnn_backward` of fastseq/ops/rnn.py.

The host part is fastseq/ops/rnn_gpu.py; this is its recurrence, csrc/cuda/rnn_forward.h and rnn_backward.h.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops import rnn_gpu
from ..ops.cells import CELLS
from ..ops.extras import Extras
from ..ops.rnn_gpu import Batch, GivenGradients, Saved
from . import devices, native
from .native import KINDS, address, kind_of
from .plan import RnnPlan, plan

__all__ = ["Recurrence", "backward", "forward"]

Pair = tuple[int, int]


class Recurrence:
    """That of `rnn_gpu`. tf32: whose flag of PyTorch's decides, "rnn" or "matmul"."""

    def __init__(self, tf32: str) -> None:
        self.tf32 = tf32

    def forward(
        self, cell: str, batch: Batch, inputs: Tensor, w_hh: Sequence[Tensor], b_ih: Sequence[Tensor],
        b_hh: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, saved: Saved, like: Tensor, extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        dirs, hidden = len(w_hh), w_hh[0].shape[1]
        h_n = like.new_empty((dirs, batch.B, hidden))
        c_n = like.new_empty(h_n.shape) if saved.cells is not None or cell == "lstm" else None
        chosen = _plan(cell, batch, inputs, hidden, dirs, "forward", self.tf32)
        group = _group(chosen, inputs, inputs.dtype)
        native.launch(
            "rnn_forward", inputs, KINDS[chosen.kind], CELLS[cell].number, _batch(batch), chosen.shape.native(), hidden,
            dirs, like.dtype is torch.float32, inputs.data_ptr(), _pair(w_hh), _pair(b_ih), _pair(b_hh), address(h0),
            address(c0), saved.out.data_ptr(), h_n.data_ptr(), address(c_n), address(saved.gates), address(saved.cells),
            _addresses(group), _noise(extras),
        )  # fmt: skip
        return h_n, c_n

    def backward(
        self, cell: str, batch: Batch, given: GivenGradients, w_hh: Sequence[Tensor], h0: Tensor | None,
        c0: Tensor | None, saved: Saved, d_gates: Tensor, h_before: Tensor | None, d_h0: Tensor | None,
        d_c0: Tensor | None, extras: Extras,
    ) -> Tensor | None:  # fmt: skip
        dirs, hidden, out = len(w_hh), w_hh[0].shape[1], saved.out
        of_state = out.dtype if h0 is None else h0.dtype
        d_h_n, d_c_n = (None if t is None else t.to(of_state) for t in given[1:3])
        chosen = _plan(cell, batch, out, hidden, dirs, "backward", self.tf32)
        group = _group(chosen, out, torch.float32)
        native.launch(
            "rnn_backward", out, KINDS[chosen.kind], CELLS[cell].number, _batch(batch), chosen.shape.native(), hidden,
            dirs, of_state is torch.float32, address(given.out), address(d_h_n), address(d_c_n),
            address(given.cells), _pair(w_hh), address(h0), address(c0), out.data_ptr(), address(saved.gates),
            address(saved.cells), d_gates.data_ptr(), address(h_before), address(d_h0), address(d_c0),
            _addresses(group), _noise(extras),
        )  # fmt: skip
        return d_c0


forward = partial(rnn_gpu.forward, Recurrence("rnn"))
backward = partial(rnn_gpu.backward, Recurrence("rnn"))


def _plan(cell: str, batch: Batch, x: Tensor, hidden: int, directions: int, way: str, tf32: str) -> RnnPlan:
    kind = kind_of(x.dtype, rnn_gpu.tf32_flag(tf32))
    return plan(cell, batch.B, hidden, kind, devices.of(x.device), directions, way)


def _batch(batch: Batch) -> tuple[Any, ...]:
    lengths = batch.lengths
    wide = lengths is not None and lengths.dtype is torch.int64
    return (*batch.sizes, address(batch.starts), address(lengths), wide, address(batch.resets))


def _pair(of_directions: Sequence[Tensor]) -> Pair:
    """Addresses of both directions, 0 for what is not there."""
    first, second = (*of_directions, None, None)[:2]
    return address(first), address(second)


_SILENT = (False, 0, 0, 0, 0, 1.0, 0.0, 0.0)


def _noise(extras: Extras) -> tuple[Any, ...]:
    """csrc/cuda/rnn.h's RnnNoise. Shares hold where there is no mask, the scale where there is one."""
    if extras.silent:
        return _SILENT
    scale, share_h, share_c = extras.rates
    return (
        True, *map(address, extras[:4]), 1.0 if extras.update is None else scale,
        share_h if extras.hold_h is None else 0.0, share_c if extras.hold_c is None else 0.0,
    )  # fmt: skip


def _group(chosen: RnnPlan, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What blocks of a grid meet by: the exchange, counters, and the flag of one that gave up."""
    flag = native.stop_flag(x)
    if not chosen.exchange:
        return None, None, flag
    exchange = torch.empty(chosen.exchange, dtype=dtype, device=x.device)
    return exchange, torch.zeros(chosen.exchange[0], dtype=torch.int32, device=x.device), flag


def _addresses(group: tuple[Tensor | None, Tensor | None, Tensor]) -> tuple[int, int, int, int]:
    return address(group[0]), address(group[1]), group[2].data_ptr(), native.patience()
