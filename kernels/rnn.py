"""One recurrent layer, forward and backward: the schemas `rnn_forward` and `rnn_backward` of fastseq/ops/rnn.py.

The products of all steps at once, x W_ih' before the recurrence and the weights' gradients after it, are PyTorch's; the
recurrence is one of two kernels, of which configs.json says which: rnn_sequence.py where one program can hold W_hh,
rnn_steps.py otherwise. State is fp32; saved gates and gradients of gates have x's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import rnn_sequence, rnn_steps
from .cells import CELLS, Cell
from .configs import Config, choose, find
from .launch import Launch, aligned, cdiv, device_of, precision, run, tf32_allowed, without_autocast
from .rnn_batch import Batch
from .rnn_gradients import weight_gradients

__all__ = ["backward", "forward"]


def forward(
    cell: str,  # a key of CELLS
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H], in x's dtype or fp32
    c0: Tensor | None,
    weights: Sequence[Tensor],  # D times w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh)
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B] bool, [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T] int64 on the CPU
    batch_first: bool,
    bidirectional: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out, h_n, c_n of an LSTM, and with `save` gates [D, tokens, 4, H] and an LSTM's cells [D, tokens, H] in fp32."""
    kind, batch = CELLS[cell], Batch.of(x, lengths, resets, batch_sizes, batch_first)
    h0, c0 = _states(h0, c0)
    w_ih, w_hh, b_ih, b_hh = _split(weights, bidirectional)
    dirs, hidden = len(w_hh), w_hh[0].shape[1]
    new = x.new_zeros if batch.ragged else x.new_empty
    out = new((*x.shape[:-1], dirs * hidden))
    inputs = _projected(x, w_ih, batch.tokens)
    gates = cells = None
    if save:
        whole = kind.gates == kind.columns  # then each gate takes its input's place as it is computed
        gates = inputs if whole else x.new_empty((dirs, batch.tokens, kind.columns * hidden))
        gates = gates.view(dirs, batch.tokens, kind.columns, hidden)
        cells = x.new_empty((dirs, batch.tokens, hidden), dtype=torch.float32) if kind.cell_state else None
    like, shape = x if h0 is None else h0, (dirs, batch.B, hidden)
    if not batch.B:
        return out, like.new_empty(shape), like.new_empty(shape) if kind.cell_state else None, gates, cells
    constants = {
        "CELL": kind.forward, "INPUT": kind.INPUT, "HIDDEN": kind.HIDDEN, "GATES": kind.gates,
        "COLUMNS": kind.columns, "CELL_STATE": kind.cell_state, "DIRECTIONS": dirs, "H": hidden,
        "PRECISION": _precision(x),
    }  # fmt: skip
    products = (inputs, *_pair(w_hh), *_pair(b_ih), *_pair(b_hh))
    config = find("rnn_sequence_forward", x.dtype, hidden, device_of(x))
    if config is not None:
        h_n = like.new_empty(shape)
        c_n = like.new_empty(shape) if kind.cell_state else None
        args = (*products, h0, c0, *batch.places, out, h_n, c_n, gates, cells)
        _run_sequence(rnn_sequence.forward_kernel, x, args, batch, constants, config)
    else:
        h_n = like.new_zeros(shape) if h0 is None else h0.clone()
        carry = _started(c0 if kind.cell_state else h0, shape, x)
        exchange = x.new_zeros((2, *shape)) if h0 is None else torch.stack((h0, h0)).to(x.dtype)
        args = (*products, *batch.places, exchange, carry, out, h_n, gates, cells)
        _run_steps("forward", x, args, batch, batch.T, constants)
        c_n = carry.to(h_n.dtype) if kind.cell_state else None
    return out, h_n, c_n, gates, cells


def backward(
    cell: str,
    d_out: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_sizes: Tensor | None,
    batch_first: bool,
    bidirectional: bool,
    out: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    needs: Sequence[bool],  # x, h0, c0, weights
) -> list[Tensor]:
    """d_x, d_h0, d_c0, then one a weight; those not needed are empty."""
    kind, batch = CELLS[cell], Batch.of(x, lengths, resets, batch_sizes, batch_first)
    w_ih, w_hh, b_ih, _ = _split(weights, bidirectional)
    dirs, hidden = len(w_hh), w_hh[0].shape[1]
    d_h0, d_c0 = (
        s.new_empty(s.shape) if need and s is not None else None for s, need in zip((h0, c0), needs[1:3], strict=True)
    )
    new = x.new_zeros if batch.ragged else x.new_empty
    d_gates = new((dirs, batch.tokens, kind.columns * hidden))
    h_before = new((dirs, batch.tokens, hidden)) if needs[3] else None
    if batch.B:
        d_c0 = _recurrence_backward(
            kind, d_out, d_h_n, d_c_n, h0, c0, w_hh, batch, out, gates, cells, d_gates, h_before, d_h0, d_c0
        )
    if needs[3] and batch.ragged:  # behind a row's end may stand NaN
        x = torch.where(batch.valid(batch_first), x, 0.0)
    rows = x.reshape(batch.tokens, x.shape[-1])
    d_x = _input_gradient(x, w_ih, d_gates) if needs[0] else None
    found: list[Tensor | None] = [d_x, d_h0, d_c0]
    if h_before is None:
        found += [None] * len(weights)
    else:
        for of_direction, before in zip(d_gates.unbind(), h_before.unbind(), strict=True):
            found += weight_gradients(kind, of_direction, rows, before, bool(b_ih))
    return [x.new_empty(0) if g is None else g for g in found]


def _recurrence_backward(
    kind: Cell, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, h0: Tensor | None, c0: Tensor | None,
    w_hh: Sequence[Tensor], batch: Batch, out: Tensor, gates: Tensor, cells: Tensor | None, d_gates: Tensor,
    h_before: Tensor | None, d_h0: Tensor | None, d_c0: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Fill d_gates and, unless they are None, h_before, d_h0 and d_c0; gives the last."""
    dirs, hidden = len(w_hh), w_hh[0].shape[1]
    d_out = None if d_out is None else aligned(d_out.to(out.dtype))
    d_h_n, d_c_n, h0, c0 = (None if t is None else aligned(t) for t in (d_h_n, d_c_n, h0, c0))
    w = _pair(w_hh)
    constants = {
        "CELL": kind.backward, "HIDDEN": kind.HIDDEN, "PLACE": kind.PLACE, "GATES": kind.gates,
        "COLUMNS": kind.columns, "CELL_STATE": kind.cell_state, "DIRECT": kind.direct, "DIRECTIONS": dirs, "H": hidden,
        "PRECISION": _precision(out),
    }  # fmt: skip
    saved = (h0, c0, *batch.places, out, gates, cells if kind.cell_state else None, d_gates, h_before)
    config = find("rnn_sequence_backward", out.dtype, hidden, device_of(out))
    if config is not None:
        args = (d_out, d_h_n, d_c_n, *w, *saved, d_h0, d_c0)
        _run_sequence(rnn_sequence.backward_kernel, out, args, batch, constants, config)
        return d_c0
    carry = _started(d_c_n, (dirs, batch.B, hidden), out)
    args = (d_out, d_h_n, *w, *saved, carry, d_h0)
    _run_steps("backward", out, args, batch, batch.T + (d_h0 is not None), constants)
    return None if d_c0 is None else carry.to(d_c0.dtype)


def _run_sequence(
    kernel: Any, x: Tensor, args: tuple[Tensor | None, ...], batch: Batch, constants: dict[str, Any], config: Config
) -> None:
    grid = (cdiv(batch.B, config.blocks["rows"]), constants["DIRECTIONS"])
    constants = constants | config.constants
    run(x, Launch(kernel, grid, (*args, *batch.sizes), constants, config.warps, config.stages, unshared=True))


def _run_steps(
    way: str, x: Tensor, args: tuple[Tensor | None, ...], batch: Batch, steps: int, constants: dict[str, Any]
) -> None:
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


def _split(weights: Sequence[Tensor], bidirectional: bool) -> tuple[list[Tensor], ...]:
    """w_ih, w_hh, b_ih, b_hh of each direction; the latter two are empty without biases."""
    per = len(weights) // (2 if bidirectional else 1)
    kinds = [[aligned(w) for w in weights[k::per]] for k in range(per)]
    return (*kinds, [], [])[:4]


def _states(h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous, in one dtype."""
    if h0 is not None and c0 is not None and c0.dtype != h0.dtype:
        h0, c0 = h0.float(), c0.float()
    return None if h0 is None else aligned(h0), None if c0 is None else aligned(c0)


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


def _projected(x: Tensor, w_ih: Sequence[Tensor], tokens: int) -> Tensor:
    """x W_ih' of each direction: [D, tokens, G * H]."""
    rows = x.reshape(tokens, x.shape[-1])
    products = x.new_empty((len(w_ih), tokens, w_ih[0].shape[0]))
    for product, w in zip(products.unbind(), w_ih, strict=True):
        torch.mm(rows, w.t(), out=product)
    return products


def _input_gradient(x: Tensor, w_ih: Sequence[Tensor], d_gates: Tensor) -> Tensor:
    """sum over directions of (d_gates W_ih), in x's shape."""
    first, *others = d_gates.narrow(2, 0, w_ih[0].shape[0]).unbind()
    with without_autocast(x):
        d_x = torch.mm(first, w_ih[0])
        for d, other in enumerate(others, 1):
            d_x.addmm_(other, w_ih[d])
    return d_x.view(x.shape)
