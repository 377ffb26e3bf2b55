"""The recurrence of one recurrent layer, forward and backward; the layer around it is fastseq/ops/rnn_gpu.py.

One of two kernels, of which configs.json says which: rnn_sequence.py where one program can hold W_hh, rnn_steps.py
otherwise.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastseq.ops import rnn_gpu
from fastseq.ops.extras import Extras
from fastseq.ops.rnn_gpu import Batch, GivenGradients, Saved

from . import rnn_sequence, rnn_steps
from .cells import CELLS
from .configs import Config, choose, find
from .launch import Launch, cdiv, device_of, precision, run, tf32_allowed
from .rnn_noise import Masks

__all__ = ["backward", "forward"]


class _Recurrence:
    def forward(
        self, cell: str, batch: Batch, inputs: Tensor, w_hh: Sequence[Tensor], b_ih: Sequence[Tensor],
        b_hh: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None, saved: Saved, like: Tensor, extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        kind, x = CELLS[cell], inputs
        dirs, hidden = len(w_hh), w_hh[0].shape[1]
        shape = (dirs, batch.B, hidden)
        masks, recurrent = Masks.of(extras), extras.recurrent
        constants = {
            "CELL": kind.forward, "INPUT": kind.INPUT, "HIDDEN": kind.HIDDEN, "GATES": kind.gates,
            "COLUMNS": kind.columns, "CELL_STATE": kind.cell_state, "MASKED": masks is not None, "DIRECTIONS": dirs,
            "H": hidden, "PRECISION": _precision(x),
        }  # fmt: skip
        products = (inputs, *_pair(w_hh), *_pair(b_ih), *_pair(b_hh))
        config = find("rnn_sequence_forward", x.dtype, hidden, device_of(x))
        if config is not None:
            h_n = like.new_empty(shape)
            c_n = like.new_empty(shape) if kind.cell_state else None
            args = (*products, h0, c0, *batch.places, saved.out, h_n, c_n, saved.gates, saved.cells, masks, recurrent)
            _run_sequence(rnn_sequence.forward_kernel, x, args, batch, constants, config)
            return h_n, c_n
        h_n = like.new_zeros(shape) if h0 is None else h0.clone()
        carry = _started(c0 if kind.cell_state else h0, shape, x)
        h_carry = _started(h0, shape, x) if kind.cell_state and masks is not None and masks.of_h else None
        seen = h0 if h0 is None or recurrent is None else h0 * recurrent
        exchange = x.new_zeros((2, *shape)) if seen is None else torch.stack((seen, seen)).to(x.dtype)
        states = (exchange, carry, h_carry, saved.out, h_n)
        args = (*products, *batch.places, *states, saved.gates, saved.cells, masks, recurrent)
        _run_steps("forward", x, args, batch, batch.T, constants)
        return h_n, carry.to(h_n.dtype) if kind.cell_state else None

    def backward(
        self, cell: str, batch: Batch, given: GivenGradients, w_hh: Sequence[Tensor], h0: Tensor | None,
        c0: Tensor | None, saved: Saved, d_gates: Tensor, h_before: Tensor | None, d_h0: Tensor | None,
        d_c0: Tensor | None, extras: Extras,
    ) -> Tensor | None:  # fmt: skip
        kind, out = CELLS[cell], saved.out
        dirs, hidden = len(w_hh), w_hh[0].shape[1]
        masks, recurrent = Masks.of(extras), extras.recurrent
        constants = {
            "CELL": kind.backward, "HIDDEN": kind.HIDDEN, "PLACE": kind.PLACE, "GATES": kind.gates,
            "COLUMNS": kind.columns, "CELL_STATE": kind.cell_state, "MASKED": masks is not None,
            "DIRECT": kind.direct, "DIRECTIONS": dirs, "H": hidden, "PRECISION": _precision(out),
        }  # fmt: skip
        read = (h0, c0, *batch.places, *saved, d_gates, h_before)
        config = find("rnn_sequence_backward", out.dtype, hidden, device_of(out))
        if config is not None:
            args: tuple[Any, ...] = (*given, *_pair(w_hh), *read, d_h0, d_c0, masks, recurrent)
            _run_sequence(rnn_sequence.backward_kernel, out, args, batch, constants, config)
            return d_c0
        carry, dh_kept = _started(given.c_n, (dirs, batch.B, hidden), out), None
        if masks is not None and masks.of_h:
            dh_kept = torch.zeros_like(carry) if kind.cell_state else None
            constants["DIRECT"] = not kind.cell_state
        args = (given.out, given.h_n, given.cells, *_pair(w_hh), *read, carry, dh_kept, d_h0, masks, recurrent)
        _run_steps("backward", out, args, batch, batch.T + (d_h0 is not None), constants)
        return None if d_c0 is None else carry.to(d_c0.dtype)


forward = partial(rnn_gpu.forward, _Recurrence())
backward = partial(rnn_gpu.backward, _Recurrence())


def _run_sequence(
    kernel: Any, x: Tensor, args: tuple[Any, ...], batch: Batch, constants: dict[str, Any], config: Config
) -> None:
    grid = (cdiv(batch.B, config.blocks["rows"]), constants["DIRECTIONS"])
    constants = constants | config.constants
    run(x, Launch(kernel, grid, (*args, *batch.sizes), constants, config.warps, config.stages, unshared=True))


def _run_steps(way: str, x: Tensor, args: tuple[Any, ...], batch: Batch, steps: int, constants: dict[str, Any]) -> None:
    """All steps in one launch where a grid can wait for itself, otherwise a launch each."""
    device, hidden = device_of(x), constants["H"]
    config = choose(f"rnn_steps_{way}", x.dtype, hidden, device)
    kernel = rnn_steps.forward_kernel if way == "forward" else rnn_steps.backward_kernel
    tiles = cdiv(batch.B, config.blocks["rows"]) * cdiv(hidden, config.blocks["units"])
    tiles *= constants["DIRECTIONS"]
    constants = constants | config.constants | {"BARRIER": device.cooperative}
    if device.cooperative:
        counter = torch.zeros(1, dtype=torch.int32, device=x.device)
        ranges = [((min(tiles, device.units),), (counter, *batch.sizes, 0, steps))]
    else:
        ranges = [((tiles,), (None, *batch.sizes, s, s + 1)) for s in range(steps)]
    for grid, rest in ranges:
        run(
            x,
            Launch(
                kernel, grid, (*args, *rest), constants, config.warps, config.stages, device.cooperative, unshared=True
            ),
        )


def _pair(of_directions: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Of both directions, None for what is not there."""
    first, second = (*of_directions, None, None)[:2]
    return first, second


def _started(initial: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A new fp32 tensor on x's device that holds `initial`, or zeros."""
    if initial is None:
        return x.new_zeros(shape, dtype=torch.float32)
    return initial.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _precision(x: Tensor) -> str:
    return precision(x.dtype, tf32_allowed(x, "rnn"))
