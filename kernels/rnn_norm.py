"""A layer-normalised recurrence, one direction a call; the operator is fastseq/ops/rnn_norm.py, the equations stand in
backends/reference.py.

N(W_ih x) of all steps comes first and its gradients last (rnn_norm_inputs.py). Between them runs one of two kernels, of
which configs.json says which: rnn_norm_sequence.py where one program can hold W_hh, rnn_norm_steps.py otherwise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.extras import Extras
from fastseq.ops.rnn_gpu import Batch, aligned, aligned_masks, without_autocast
from fastseq.ops.rnn_norm import GIVEN, Given, norm_gradients, norm_outputs, spread_sums

from . import rnn_norm_inputs, rnn_norm_sequence, rnn_norm_steps, rnn_norm_steps_backward
from .cells import CELLS
from .configs import Config, choose, find
from .launch import Launch, cdiv, device_of, precision, run, tf32_allowed
from .rnn_noise import SILENT, Masks
from .rnn_norm_blocks import Norms
from .rnn_norm_steps import Kept, Places, Static, Work
from .rnn_norm_steps_backward import Back, Found

__all__ = ["backward", "forward"]

_WIDE = torch.float32


def forward(cell: str, *args: Any) -> list[Tensor | None]:
    """Results of rnn_norm_forward, None for those that this call has not."""
    *options, states, save = args
    given = _aligned(Given(*options))
    x, w_ih = given.x, given.weights[0]
    batch = Batch.of(x, given.lengths, given.resets, given.batch_sizes, given.batch_first)
    results = norm_outputs(cell, given, states, save, batch.ragged, batch.B)
    if batch.ragged and save:  # what is summed over all tokens
        for saved in results[4:8]:
            if saved is not None:
                saved.zero_()
    out, h_n, c_n, _, *saved, c_out = results
    if c_out is not None and not save:
        new = x.new_zeros if batch.ragged else x.new_empty
        saved[2] = new((batch.tokens, given.hidden), dtype=_WIDE)
    inputs = torch.mm(x.reshape(batch.tokens, x.shape[-1]), w_ih.t())
    results[3] = inputs.view(*x.shape[:-1], w_ih.shape[0]) if save else None
    _run_inputs("forward", cell, given, batch, (inputs, results[7]))
    if batch.B:
        config = find("rnn_norm_sequence_forward", x.dtype, given.hidden, device_of(x))
        if config is not None:
            tensors = (inputs, given.weights[1], _norms(given), given.h0, given.c0, *batch.places, out, h_n, c_n)
            _run_sequence("forward", cell, given, batch, (*tensors, *saved), config)
        else:
            results[1:3] = _forward_steps(cell, given, batch, inputs, out, h_n, saved)
    if c_out is not None and saved[2] is not None:
        c_out.view(batch.tokens, given.hidden).copy_(saved[2])
    return results


def backward(
    cell: str, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, d_c_out: Tensor | None, *args: Any
) -> list[Tensor]:  # fmt: skip
    """Results of rnn_norm_backward."""
    given = _aligned(Given(*args[:GIVEN]))
    out, hats_x, hats, gates, cells, stats, needs = args[GIVEN:]
    kind, x, hidden = CELLS[cell], given.x, given.hidden
    batch = Batch.of(x, given.lengths, given.resets, given.batch_sizes, given.batch_first)
    results = norm_gradients(given, needs)
    d_x, d_h0, d_c0, *d_weights = results
    new = x.new_zeros if batch.ragged else x.new_empty
    d_gates, d_products = (new((batch.tokens, n * hidden)) for n in (kind.columns, kind.gates))
    h_before = new((batch.tokens, hidden))
    d_read = new((batch.tokens, hidden)) if kind.cell_state else None
    hats_c = new((batch.tokens, hidden), dtype=_WIDE) if kind.cell_state else None
    if batch.B:
        grads = [None if g is None else aligned(g) for g in (d_out, d_h_n, d_c_n, d_c_out)]
        saved = (out, hats, gates, cells if kind.cell_state else None, stats)
        states = [d if d.numel() else None for d in (d_h0, d_c0)]
        found = (d_gates, d_read, hats_c, d_products, h_before)
        config = find("rnn_norm_sequence_backward", x.dtype, hidden, device_of(x))
        if config is not None:
            tensors = (*grads, given.weights[1], _norms(given), given.h0, given.c0, *batch.places, *saved, *found)
            _run_sequence("backward", cell, given, batch, (*tensors, *states), config)
        else:
            read = rnn_norm_steps_backward.Given(*grads[:2], grads[3], given.h0, given.c0, *saved)
            d_c0 = _backward_steps(cell, given, batch, read, grads[2], Found(*found, states[0]))
            if states[1] is not None:
                results[2] = d_c0.to(states[1].dtype)
    d_inputs = torch.empty_like(d_products)
    _run_inputs("backward", cell, given, batch, (d_gates, _norms(given).gain_x, hats_x, stats, d_inputs))
    with without_autocast(x):
        if needs[0]:
            torch.mm(d_inputs, given.weights[0], out=d_x.view(batch.tokens, x.shape[-1]))
        if needs[3]:
            torch.mm(d_inputs.t(), x.reshape(batch.tokens, x.shape[-1]), out=d_weights[0])
            torch.mm(d_products.t(), h_before, out=d_weights[1])
            sums = _sums(cell, d_gates, d_read, hats_x.view(hats.shape), hats, hats_c)
            results[5:] = spread_sums(sums, given.weights, given.norms)
    return results


def _sums(
    cell: str, d_gates: Tensor, d_read: Tensor | None, hats_x: Tensor, hats: Tensor, hats_c: Tensor | None
) -> Tensor:
    """As `spread_sums` has them."""
    kind = CELLS[cell]
    hidden = d_gates.shape[1] // kind.columns
    of_x = of_h = d_gates.narrow(1, 0, kind.gates * hidden)
    if kind.columns > kind.gates:
        places = [kind.PLACE[kind.HIDDEN.index(gate)] for gate in range(kind.gates)]
        of_h = torch.cat([d_gates.narrow(1, place * hidden, hidden) for place in places], 1)
    products = [of_h * hats, of_h, of_x * hats_x, of_x]
    if d_read is not None and hats_c is not None:
        products += [d_read * hats_c, d_read]
    return torch.cat([p.sum(0, dtype=torch.float32) for p in products])


def _aligned(given: Given) -> Given:
    h0, c0 = given.h0, given.c0
    if h0 is not None and c0 is not None and h0.dtype != c0.dtype:
        h0, c0 = h0.float(), c0.float()
    h0, c0 = (None if s is None else aligned(s) for s in (h0, c0))
    weights, norms = ([aligned(t) for t in of] for of in given[6:8])
    extras = aligned_masks(given.extras)
    return given._replace(h0=h0, c0=c0, weights=weights, norms=norms, masks=extras.masks)


def _masks(extras: Extras) -> Masks:
    """Of a direction, all None where they would do nothing."""
    return Masks.of(extras) or SILENT


def _norms(given: Given) -> Norms:
    bias_x, bias = given.weights[2:] or (None, None)
    gain_x, gain, cell_gain, cell_bias = (*given.norms, None, None)[:4]
    return Norms(gain_x, bias_x, gain, bias, cell_gain, cell_bias)


def _split(cell: str) -> int:
    """Gates of the first block of statistics."""
    return 4 if CELLS[cell].cell_state else 2


def _run_inputs(way: str, cell: str, given: Given, batch: Batch, tensors: tuple[Tensor | None, ...]) -> None:
    if not batch.tokens:
        return
    kind, x = CELLS[cell], given.x
    config = choose("rnn_norm_inputs", x.dtype, given.hidden, device_of(x))
    constants = {"GATES": kind.gates, "SPLIT": _split(cell), "H": given.hidden, **config.constants}
    if way == "backward":
        constants["COLUMNS"] = kind.columns
    kernel = getattr(rnn_norm_inputs, f"{way}_kernel")
    grid = (cdiv(batch.tokens, config.blocks["rows"]),)
    run(x, Launch(kernel, grid, (*tensors, batch.tokens), constants, config.warps, config.stages))


def _run_sequence(way: str, cell: str, given: Given, batch: Batch, tensors: tuple[Any, ...], config: Config) -> None:
    kind, x = CELLS[cell], given.x
    constants: dict[str, Any] = {
        "CELL": getattr(kind, way), "HIDDEN": kind.HIDDEN, "GATES": kind.gates, "COLUMNS": kind.columns,
        "CELL_STATE": kind.cell_state, "SPLIT": _split(cell), "H": given.hidden, "PRECISION": _precision(x),
        **config.constants,
    }  # fmt: skip
    masks = _masks(given.extras)
    if way == "forward":
        constants["INPUT"] = kind.INPUT
    else:
        constants |= {"PLACE": kind.PLACE, "MASKED": masks is not SILENT, "DIRECT": kind.direct}
    kernel = getattr(rnn_norm_sequence, f"{way}_kernel")
    grid = (cdiv(batch.B, config.blocks["rows"]),)
    args = (*tensors, masks, given.extras.recurrent, *batch.sizes, int(given.reverse))
    run(x, Launch(kernel, grid, args, constants, config.warps, config.stages, unshared=True))


def _forward_steps(
    cell: str, given: Given, batch: Batch, inputs: Tensor, out: Tensor | None, like: Tensor | None,
    saved: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """h_n, of like's shape, and c_n; `out` and `saved` are filled."""
    kind, x = CELLS[cell], given.x
    config = choose("rnn_norm_steps_forward", x.dtype, given.hidden, device_of(x))
    z = _static(cell, given, config)
    masks, recurrent = _masks(given.extras), given.extras.recurrent
    h_n = torch.zeros_like(like) if given.h0 is None else given.h0.clone()
    handed = (h_n if recurrent is None else h_n * recurrent).squeeze(0).to(x.dtype, copy=True)
    carry = _started(given.c0 if kind.cell_state else given.h0, batch.B, given)
    h_carry = _started(given.h0, batch.B, given) if kind.cell_state and masks.of_h else None
    made = torch.empty_like(carry) if kind.cell_state and masks.of_c else None
    opened = torch.empty_like(carry) if kind.cell_state else None
    products = x.new_empty((batch.B, kind.gates * given.hidden), dtype=_WIDE)
    work = Work(handed, carry, h_carry, made, opened, products, *_parts(z, batch.B, x), _counter(x))
    fixed = (inputs, given.weights[1], _norms(given), Places(*batch.places), masks, recurrent)
    pointers = (*fixed, work, Kept(out, h_n, *saved))
    each = [(s, s + 1, p, p + 1) for s in range(batch.T) for p in range(z.phases)]
    _run_steps("forward", cell, given, batch, z, config, pointers, (0, batch.T, 0, z.phases), each)
    return h_n, carry.unsqueeze(0).to(h_n.dtype) if kind.cell_state else None


def _backward_steps(
    cell: str, given: Given, batch: Batch, read: rnn_norm_steps_backward.Given, d_c_n: Tensor | None, found: Found,
) -> Tensor:  # fmt: skip
    """d_c0 [1, B, H] in fp32; `found` is filled."""
    kind, x = CELLS[cell], given.x
    config = choose("rnn_norm_steps_backward", x.dtype, given.hidden, device_of(x))
    z = _static(cell, given, config)
    carry = _started(d_c_n, batch.B, given)
    masks, recurrent = _masks(given.extras), given.extras.recurrent
    kept = torch.zeros_like(carry) if kind.cell_state and masks.of_h else None
    dh = torch.empty_like(carry) if kind.cell_state else None
    d_hats = x.new_empty((batch.B, kind.gates * given.hidden), dtype=_WIDE)
    back = Back(carry, kept, dh, d_hats, *_parts(z, batch.B, x), _counter(x))
    pointers = (given.weights[1], _norms(given), Places(*batch.places), masks, recurrent, read, found, back)
    last = batch.T + (found.h0 is not None)
    each = [(s, s + 1, p, p + 1) for s in range(batch.T) for p in range(z.phases)]
    each += [(s, s + 1, 0, 1) for s in range(batch.T, last)]
    _run_steps("backward", cell, given, batch, z, config, pointers, (0, last, 0, z.phases), each)
    return carry.unsqueeze(0)


def _run_steps(
    way: str, cell: str, given: Given, batch: Batch, z: Static, config: Config, pointers: tuple[Any, ...],
    whole: tuple[int, ...], each: Sequence[tuple[int, ...]],
) -> None:  # fmt: skip
    """All phases of all steps: in one launch where a grid can wait for itself, otherwise a launch each."""
    device = device_of(given.x)
    module = rnn_norm_steps if way == "forward" else rnn_norm_steps_backward
    tiles = cdiv(batch.B, z.rows) * z.across
    constants = {"CELL": getattr(CELLS[cell], way), "Z": z, "BARRIER": device.cooperative}
    sizes = (batch.T, batch.B, batch.step, batch.row, int(given.reverse))
    grid = (min(tiles, device.units) if device.cooperative else tiles,)
    for part in [whole] if device.cooperative else each:
        args = (*pointers, *sizes, *part)
        launch = Launch(
            module.__dict__[f"{way}_kernel"], grid, args, constants, config.warps, config.stages, device.cooperative,
            unshared=True,
        )  # fmt: skip
        run(given.x, launch)


def _static(cell: str, given: Given, config: Config) -> Static:
    kind, of = CELLS[cell], config.blocks
    return Static(
        kind.INPUT, kind.HIDDEN, kind.PLACE, kind.gates, kind.columns, kind.cell_state, kind.direct,
        _masks(given.extras) is not SILENT, _split(cell), given.hidden, of["rows"], of["units"], of["k"],
        _precision(given.x),
    )  # fmt: skip


def _parts(z: Static, rows: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What tiles say of a row's gates and of its c."""
    blocks = 1 if z.split == z.gates else 2
    of_c = x.new_empty((2, rows, z.across), dtype=_WIDE) if z.cell_state else None
    return x.new_empty((blocks, 2, rows, z.across), dtype=_WIDE), of_c


def _counter(x: Tensor) -> Tensor | None:
    cooperative = device_of(x).cooperative
    return torch.zeros(1, dtype=torch.int32, device=x.device) if cooperative else None


def _started(initial: Tensor | None, rows: int, given: Given) -> Tensor:
    """A new fp32 tensor [B, H] that holds `initial` [1, B, H], or zeros."""
    if initial is None:
        return given.x.new_zeros((rows, given.hidden), dtype=_WIDE)
    return initial.squeeze(0).to(_WIDE, copy=True, memory_format=torch.contiguous_format)


def _precision(x: Tensor) -> str:
    return precision(x.dtype, tf32_allowed(x, "rnn"))
