"""One step of a layer or a cell: both products and the cell in one launch; backward's d_gates, d_x and d_h in another.

Called as fastseq/ops/step.py calls its native twin, thousands of times a second.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.ops.rnn_gpu import StepResults, cell_gradients

from .blocks import dot, product, spanning
from .cells import CELLS, Cell
from .configs import Config, choose
from .devices import Device
from .launch import Launch, aligned, cdiv, device_of, placed, precision, run, tf32_allowed
from .rnn_batch import bias_rows

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x,  # [B, I], rows x_row apart
    w_ih,  # [G * H, I]
    w_hh,  # [G * H, H]
    b_ih,  # [G * H] or None
    b_hh,
    h0,  # [B, H] or None
    c0,
    out,  # [B, H] or None: h once more
    h,  # [B, H]
    c,  # the same, or None
    gates,  # [B, COLUMNS, H] or None
    cells,  # [B, H] fp32 or None
    B,
    x_row,
    CELL: tl.constexpr,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    I: tl.constexpr,  # noqa: E741  (the project's letter)
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    units = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    units_in = units < H
    here = rows_in[:, None] & units_in[None, :]
    at = rows[:, None] * H + units[None, :]
    biases = bias_rows(b_ih, None, b_hh, None, 0, units, units_in, INPUT, HIDDEN, COLUMNS, 1, H)
    pre = ()
    for k in tl.static_range(COLUMNS):
        pre = pre + (tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32) + biases[k][None, :],)
    pre = product(pre, INPUT, x, x_row, rows, rows_in, w_ih, I, 1, units, units_in, H, I, BLOCK_K, PRECISION)
    state = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if h0 is not None:
        pre = product(pre, HIDDEN, h0, H, rows, rows_in, w_hh, H, 1, units, units_in, H, H, BLOCK_K, PRECISION)
        if not CELL_STATE:
            state = tl.load(h0 + at, here, 0.0).to(tl.float32)
    if CELL_STATE and c0 is not None:
        state = tl.load(c0 + at, here, 0.0).to(tl.float32)
    new_h, new_c, saved = CELL(pre, state, state)
    tl.store(h + at, new_h.to(h.dtype.element_ty), here)
    if out is not None:
        tl.store(out + at, new_h.to(out.dtype.element_ty), here)
    if CELL_STATE:
        tl.store(c + at, new_c.to(c.dtype.element_ty), here)
        if cells is not None:
            tl.store(cells + at, new_c, here)
    if gates is not None:
        p_gates = gates + rows[:, None] * (COLUMNS * H) + units[None, :]
        for k in tl.static_range(COLUMNS):
            tl.store(p_gates + k * H, saved[k].to(gates.dtype.element_ty), here)


@triton.jit
def _through_cell(
    d_out, d_h, d_c, h0, c0, gates, cells, rows, rows_in, units, CELL: tl.constexpr, COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """(the columns' gradients, carry) of these rows and units, fp32."""
    here = rows_in[:, None] & (units < H)[None, :]
    at = rows[:, None] * H + units[None, :]
    zero = tl.zeros(at.shape, tl.float32)
    grad = zero
    if d_out is not None:
        grad += tl.load(d_out + at, here, 0.0).to(tl.float32)
    if d_h is not None:
        grad += tl.load(d_h + at, here, 0.0).to(tl.float32)
    saved = ()
    for k in tl.static_range(COLUMNS):
        saved = saved + (
            tl.load(gates + rows[:, None] * (COLUMNS * H) + k * H + units[None, :], here, 0.0).to(tl.float32),
        )
    initial = zero
    carry = zero
    after = zero
    if CELL_STATE:
        after = tl.load(cells + at, here, 0.0)
        if c0 is not None:
            initial = tl.load(c0 + at, here, 0.0).to(tl.float32)
        if d_c is not None:
            carry = tl.load(d_c + at, here, 0.0).to(tl.float32)
    elif h0 is not None:
        initial = tl.load(h0 + at, here, 0.0).to(tl.float32)
    d_pre, carry = CELL(saved, initial, after, grad, carry)
    return d_pre, carry


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    d_out,  # [B, H] or None
    d_h,
    d_c,
    w_ih,  # [G * H, I]
    w_hh,  # [G * H, H]
    h0,  # [B, H] or None
    c0,
    gates,  # [B, COLUMNS, H]
    cells,  # [B, H] fp32 or None
    d_gates,  # [B, COLUMNS, H], column k at PLACE[k]
    d_x,  # [B, I] or None
    d_h0,  # [B, H] or None
    d_c0,
    B,
    CELL: tl.constexpr,
    INPUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    PLACE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CELL_STATE: tl.constexpr,
    DIRECT: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, j): rows i, and block j of the features of d_x, then of d_h0. All do the cell; j = 0 stores it."""
    x_blocks: tl.constexpr = (I + BLOCK_UNITS - 1) // BLOCK_UNITS if d_x is not None else 0
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    rows_in = rows < B
    j = tl.program_id(1)
    of_input = j < x_blocks
    width = tl.where(of_input, I, H)
    features = tl.where(of_input, j, j - x_blocks) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    features_in = features < width
    w = w_hh
    if of_input:
        w = w_ih
    gradient = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_in = k < H
        d_pre, carry = _through_cell(
            d_out, d_h, d_c, h0, c0, gates, cells, rows, rows_in, k, CELL, COLUMNS, CELL_STATE, H
        )  # fmt: skip
        here = rows_in[:, None] & k_in[None, :] & (j == 0)
        for column in tl.static_range(COLUMNS):
            of_column = d_pre[column].to(d_gates.dtype.element_ty)
            p_grads = d_gates + rows[:, None] * (COLUMNS * H) + PLACE[column] * H + k[None, :]
            tl.store(p_grads, of_column, here)
            if d_x is not None or d_h0 is not None:
                gate = tl.where(of_input, INPUT[column], HIDDEN[column])
                square = k_in[:, None] & features_in[None, :] & (gate >= 0)
                row = spanning(gate * H + k, 4 * H * (I + H))[:, None]
                of_gate = tl.load(w + row * width + features[None, :], square, 0.0)
                gradient = dot(of_column, of_gate, gradient, PRECISION)
        if d_c0 is not None:
            tl.store(d_c0 + rows[:, None] * H + k[None, :], carry.to(d_c0.dtype.element_ty), here)
    there = rows_in[:, None] & features_in[None, :]
    if d_x is not None:
        p_x = d_x + rows[:, None] * I + features[None, :]
        tl.store(p_x, gradient.to(d_x.dtype.element_ty), there & of_input)
    if d_h0 is not None:
        if DIRECT:
            of_units = tl.where(of_input, H, features)  # none
            _, carry = _through_cell(
                d_out, d_h, d_c, h0, c0, gates, cells, rows, rows_in, of_units, CELL, COLUMNS, CELL_STATE, H
            )  # fmt: skip
            gradient += carry
        p_h = d_h0 + rows[:, None] * H + features[None, :]
        tl.store(p_h, gradient.to(d_h0.dtype.element_ty), there & (j >= x_blocks))


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
    cell, hidden = CELLS[name], state[-1]
    made = StepResults.empty(shape, x, h0, save)
    if rows:
        config, constants = _plan(
            "forward", cell, x.dtype, x.shape[-1], hidden, tf32_allowed(x, "matmul"), device_of(x)
        )
        grid = (cdiv(rows, config.blocks["rows"]), cdiv(hidden, config.blocks["units"]))
        w_ih, w_hh, b_ih, b_hh = (*map(placed, weights), None, None)[:4]
        source = placed(x)
        row = row if source is x else x.shape[-1]
        args = (source, w_ih, w_hh, b_ih, b_hh, _at(h0), _at(c0), made.out, *made[:2], *made[3:], rows, row)
        run(x, Launch(forward_kernel, grid, args, constants, config.warps, config.stages, unshared=True))
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
    cell, hidden, features = CELLS[name], state[-1], x.shape[-1]
    dense = [None if g is None else aligned(g) for g in grads]
    d_out = None if out_shape is None else dense.pop(0)
    d_h, d_c = (*dense, None)[:2]
    d_x = x.new_empty(x.shape) if needs[0] else None
    d_h0 = torch.empty_like(h0) if needs[1] and h0 is not None else None
    d_c0 = torch.empty_like(c0) if needs[2] and c0 is not None else None
    d_gates = x.new_empty((rows, cell.columns * hidden))
    if rows:
        config, constants = _plan("backward", cell, x.dtype, features, hidden, tf32_allowed(x, "matmul"), device_of(x))
        units = config.blocks["units"]
        blocks = cdiv(features, units) * (d_x is not None) + cdiv(hidden, units) * (d_h0 is not None)
        grid = (cdiv(rows, config.blocks["rows"]), max(blocks, 1))
        w_ih, w_hh = map(placed, weights[:2])
        args = (d_out, d_h, d_c, w_ih, w_hh, _at(h0), _at(c0), gates, cells, d_gates, d_x, d_h0, d_c0, rows)
        run(x, Launch(backward_kernel, grid, args, constants, config.warps, config.stages, unshared=True))
    if not needs[3]:
        return [d_x, d_h0, d_c0, *[None] * len(weights)]
    inputs = x.reshape(rows, features)
    before = x.new_zeros((rows, hidden)) if h0 is None else h0.reshape(rows, hidden).to(x.dtype)
    return [d_x, d_h0, d_c0, *cell_gradients(cell, d_gates, inputs, before, len(weights) > 2)]


def _at(t: Tensor | None) -> Tensor | None:
    return None if t is None else placed(t)


@lru_cache(maxsize=1024)
def _plan(
    way: str, cell: Cell, dtype: torch.dtype, features: int, hidden: int, tf32: bool, device: Device
) -> tuple[Config, dict[str, Any]]:
    """The config and the constexpr parameters of the kernel of one way."""
    config = choose(f"rnn_cell_{way}", dtype, hidden, device)
    constants: dict[str, Any] = {
        "INPUT": cell.INPUT, "HIDDEN": cell.HIDDEN, "COLUMNS": cell.columns, "CELL_STATE": cell.cell_state,
        "I": features, "H": hidden, "PRECISION": precision(dtype, tf32), **config.constants,
    }  # fmt: skip
    if way == "forward":
        return config, constants | {"CELL": cell.forward}
    return config, constants | {"CELL": cell.backward, "PLACE": cell.PLACE, "DIRECT": cell.direct}
