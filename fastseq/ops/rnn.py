"""One recurrent layer as an operator: `torch.ops.fastseq.rnn_forward`, `rnn_backward` and their autograd.

Letters: T steps, B rows, N tokens of a packed batch, I input features, H units, D directions, G gates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..backends import reference
from .cells import CELLS
from .common import (
    Kernels,
    address,
    distinct,
    gpu_kernels,
    is_direct,
    needs_recording,
    not_recorded,
    saved_by,
    schema,
    through_reference,
)
from .extras import NONE, Extras
from .packed import PackedLayer

__all__ = ["noise_arguments", "rnn_layer"]

# x [T, B, I], [B, T, I] if batch_first, or packed [N, I]. h0, c0 [D, B, H], in x's dtype or fp32. weights: D times
# w_ih, w_hh (, b_ih, b_hh). resets [T, B] bool, [B, T] if batch_first: rows start there from zeros, in the reverse
# direction at the step before. out in x's layout, D * H features; h_n, c_n [D, B, H]. Saved for backward: gates
# [D, tokens, columns, H] in x's dtype, cells [D, tokens, H] in fp32 (LSTM), tokens = T * B or N; of them the active
# ones come first, in step order, longest row first. masks, rates, states: extras.py; c_out is empty without `states`.
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of rnn_forward

_LIBRARY = torch.library.Library("fastseq", "DEF")
_LIBRARY.define(
    "rnn_forward(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "Tensor? batch_sizes, bool batch_first, bool bidirectional, bool save, Tensor?[] masks, float[] rates, "
    "bool states, *, str on='') -> (Tensor out, Tensor h_n, Tensor c_n, Tensor c_out, Tensor gates, Tensor cells)"
)
# needs: x, h0, c0, weights. Returns d_x, d_h0, d_c0, then one a weight; those not needed are empty.
_LIBRARY.define(
    "rnn_backward(str cell, Tensor? d_out, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_c_out, Tensor x, Tensor? h0, "
    "Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, bool batch_first, "
    "bool bidirectional, Tensor out, Tensor gates, Tensor cells, bool[] needs, "
    "Tensor?[] masks, float[] rates, *, str on='') -> Tensor[]"
)


def _dims(x: Tensor, batch_sizes: Tensor | None, batch_first: bool, rows: int | None) -> tuple[int, int, int, int]:
    """T, B and the strides of a step and of a row."""
    if batch_sizes is not None:
        return batch_sizes.shape[0], int(batch_sizes[0]) if rows is None else rows, 0, x.stride(0)
    step, row = (1, 0) if batch_first else (0, 1)
    return x.shape[step], x.shape[row], x.stride(step), x.stride(row)


def _view(t: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, rows: int) -> tuple[int, int, int]:
    """Address and strides of a step and of a row; zeros for what is not there, None or of no dimension but 0."""
    if t is None or t.dim() == 1:
        return 0, 0, 0
    return (t.data_ptr(), *_dims(t, batch_sizes, batch_first, rows)[2:])


def _outputs(
    cell: str, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], batch_sizes: Tensor | None,
    batch_first: bool, bidirectional: bool, save: bool, states: bool, zero: bool, rows: Any,
) -> Results:  # fmt: skip
    """Empty results of rnn_forward, None for those this call has not; `zero` clears out, for rows that end early."""
    dirs, hidden = (2 if bidirectional else 1), weights[1].shape[1]
    shape = (*x.shape[:-1], dirs * hidden)
    out = x.new_zeros(shape) if zero else x.new_empty(shape)
    lstm = CELLS[cell].cell_state
    h_n = (x if h0 is None else h0).new_empty((dirs, rows, hidden))
    c_n = torch.empty_like(h_n) if lstm else None
    c_out = None if not (lstm and states) else torch.zeros_like(out) if zero else torch.empty_like(out)
    if not save:
        return out, h_n, c_n, c_out, None, None
    tokens = _tokens(x, batch_sizes)
    gates = x.new_empty((dirs, tokens, CELLS[cell].columns, hidden))
    cells = x.new_empty((dirs, tokens, hidden), dtype=torch.float32) if lstm else None
    return out, h_n, c_n, c_out, gates, cells


def _complete(x: Tensor, results: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """As an operator returns them: an empty tensor for each None."""
    return tuple(x.new_empty(0) if r is None else r for r in results)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _states(h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous, in one dtype."""
    if h0 is not None and c0 is not None and c0.dtype != h0.dtype:
        h0, c0 = h0.float(), c0.float()
    return None if h0 is None else h0.contiguous(), None if c0 is None else c0.contiguous()


def _forward(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], lengths: Tensor | None,
    resets: Tensor | None, batch_sizes: Tensor | None, batch_first: bool, bidirectional: bool, save: bool,
    extras: Extras, packed: Sequence[Tensor] = (),
) -> Results:  # fmt: skip
    assert _native.C is not None
    x, (h0, c0) = _dense(x), _states(h0, c0)
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    steps, rows, step, row = _dims(x, batch_sizes, batch_first, None if h0 is None else h0.shape[1])
    results = _outputs(
        cell, x, h0, weights, batch_sizes, batch_first, bidirectional, save, extras.states, lengths is not None, rows
    )
    out, h_n, c_n, c_out, gates, cells = results
    _, _, out_step, out_row = _dims(out, batch_sizes, batch_first, rows)
    _native.C.rnn_forward(
        CELLS[cell].number, x.dtype is torch.bfloat16, h_n.dtype is torch.float32, steps, rows, _tokens(x, batch_sizes),
        x.shape[-1], weights[1].shape[1], address(lengths), address(batch_sizes), (x.data_ptr(), step, row),
        (out.data_ptr(), out_step, out_row), tuple([w.data_ptr() for w in weights]), 2 if bidirectional else 1,
        address(h0), address(c0), h_n.data_ptr(), address(c_n), address(gates), address(cells), torch.get_num_threads(),
        _view(resets, None, batch_first, rows), tuple([p.data_ptr() for p in packed]),
        _view(c_out, batch_sizes, batch_first, rows), noise_arguments(extras, batch_sizes, batch_first, rows),
    )  # fmt: skip
    return results


def noise_arguments(extras: Extras, batch_sizes: Tensor | None, batch_first: bool, rows: int) -> tuple[Any, ...]:
    """As the native module takes it; () without."""
    if extras.silent:
        return ()
    masks = [_view(m, batch_sizes, batch_first, rows) for m in extras[:3]]
    return *masks, address(extras.recurrent), *extras.rates


def _tokens(x: Tensor, batch_sizes: Tensor | None) -> int:
    """Row-steps that the saved tensors have room for."""
    return x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]


def _gradients(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], needs: Sequence[bool], zero: bool
) -> list[Tensor]:
    """Empty results of rnn_backward. `zero` clears d_x, for rows that end early."""

    def none() -> Tensor:  # a new one each time: an operator's results may not alias each other
        return x.new_empty(0)

    d_x = (
        none()
        if not needs[0]
        else torch.zeros_like(x, memory_format=torch.contiguous_format)
        if zero
        else x.new_empty(x.shape)
    )
    states = [none() if s is None or not need else s.new_empty(s.shape) for s, need in ((h0, needs[1]), (c0, needs[2]))]
    return [d_x, *states, *(w.new_empty(w.shape) if needs[3] else none() for w in weights)]


def _backward(
    cell: str, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, d_c_out: Tensor | None, x: Tensor,
    h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], lengths: Tensor | None, resets: Tensor | None,
    batch_sizes: Tensor | None, batch_first: bool, bidirectional: bool, out: Tensor, gates: Tensor, cells: Tensor,
    needs: Sequence[bool], extras: Extras,
) -> list[Tensor]:  # fmt: skip
    assert _native.C is not None
    x, weights = _dense(x), [w.contiguous() for w in weights]
    results = _gradients(x, h0, c0, weights, needs, lengths is not None)
    state_dtype = x.dtype if h0 is None else h0.dtype
    h0, c0 = _states(h0, c0)
    d_h_n, d_c_n = (None if g is None else g.to(state_dtype).contiguous() for g in (d_h_n, d_c_n))
    d_out, d_c_out = (None if g is None else _dense(g.to(x.dtype)) for g in (d_out, d_c_out))
    rows = gates.shape[1] // x.shape[1 if batch_first else 0] if batch_sizes is None else int(batch_sizes[0])

    def view(t: Tensor | None) -> tuple[int, int, int]:
        return _view(t, batch_sizes, batch_first, rows)

    d_x, d_h0, d_c0, *d_weights = results
    _native.C.rnn_backward(
        CELLS[cell].number, x.dtype is torch.bfloat16, state_dtype is torch.float32,
        _dims(x, batch_sizes, batch_first, rows)[0], rows, gates.shape[1], x.shape[-1], weights[1].shape[1],
        address(lengths), address(batch_sizes), view(x), view(out), view(d_out), view(d_x),
        tuple([w.data_ptr() for w in weights]), 2 if bidirectional else 1, address(h0), address(c0), address(d_h_n),
        address(d_c_n), gates.data_ptr(), address(cells), d_h0.data_ptr(), d_c0.data_ptr(),
        tuple([w.data_ptr() for w in d_weights]), torch.get_num_threads(), view(resets),
        view(d_c_out), noise_arguments(extras, batch_sizes, batch_first, rows),
    )  # fmt: skip
    return results


def _fake_forward(  # type: ignore[no-untyped-def]
    cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, save, masks, rates, states,
    on="",
):  # fmt: skip
    if batch_sizes is None:
        rows = x.shape[0 if batch_first else 1]
    else:
        rows = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[1]
    return _complete(
        x, _outputs(cell, x, h0, weights, batch_sizes, batch_first, bidirectional, save, states, False, rows)
    )  # fmt: skip


def _fake_backward(  # type: ignore[no-untyped-def]
    cell, d_out, d_h_n, d_c_n, d_c_out, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional,
    out, gates, cells, needs, masks, rates, on="",
):  # fmt: skip
    return _gradients(x, h0, c0, weights, needs, False)


_NATIVE = Kernels(_forward, _backward)


def _kernels(on: str) -> Kernels:
    return _NATIVE if on == "cpu" else gpu_kernels(on, "rnn")


def _forward_operator(default: str) -> Any:
    def forward(cell, x, *given, on=""):  # type: ignore[no-untyped-def]
        *args, masks, rates, states = given
        with torch.no_grad():
            return _complete(x, _kernels(on or default).forward(cell, x, *args, Extras.of(masks, rates, states)))

    return forward


def _backward_operator(default: str) -> Any:
    def backward(*given, on=""):  # type: ignore[no-untyped-def]
        *args, masks, rates = given
        with torch.no_grad():
            return _kernels(on or default).backward(*args, Extras.of(masks, rates, False))

    return backward


for _on, _key in (("cpu", "CPU"), ("triton", "CUDA")):
    _LIBRARY.impl("rnn_forward", _forward_operator(_on), _key)
    _LIBRARY.impl("rnn_backward", _backward_operator(_on), _key)
torch.library.register_fake("fastseq::rnn_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fastseq::rnn_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("fastseq::rnn_forward", not_recorded, lib=_LIBRARY)


class _Static(NamedTuple):
    """What of a layer is no tensor."""

    on: str
    cell: str
    batch_first: bool
    bidirectional: bool
    rates: tuple[float, float, float]
    states: bool

    def extras(self, masks: Sequence[Tensor | None]) -> Extras:
        update, hold_h, hold_c, recurrent = masks
        return Extras(update, hold_h, hold_c, recurrent, self.rates, self.states)


_FIXED = 10  # of a Function's tensors, in front of the weights: x, h0, c0, lengths, resets, batch_sizes and four masks


def _backward_of(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of what the Functions below take, from what one saved; grads: of out, h_n, c_n, c_out."""
    saved = saved_by(ctx)  # asked for once: under activation checkpointing a second time is an error
    x, h0, c0, lengths, resets, batch_sizes, *masks, out, gates, cells = saved[: _FIXED + 3]
    weights = saved[_FIXED + 3 :]
    if all(g is None for g in grads):
        return (None,) * (1 + _FIXED + len(weights))
    on, cell, batch_first, bidirectional, rates, _ = ctx.static
    extras = ctx.static.extras(masks)
    if needs_recording(grads):

        def forward(x, h0, c0, recurrent, *weights):  # type: ignore[no-untyped-def]
            return reference.layer(
                cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional,
                extras._replace(recurrent=recurrent),
            )  # fmt: skip

        d_x, d_h0, d_c0, _, *d_weights = through_reference(forward, (x, h0, c0, masks[3], *weights), grads)
        return None, d_x, d_h0, d_c0, *(None,) * (_FIXED - 3), *d_weights
    needs = ctx.needs
    args: Any = (
        cell, *grads, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, out, gates, cells,
        needs,
    )  # fmt: skip
    if is_direct((x, *weights)):
        d = _kernels(on).backward(*args, extras)
    else:
        args = (*args[:-2], x.new_empty(0) if cells is None else cells, needs)
        d = schema(torch.ops.fastseq.rnn_backward.default, on)(*args, extras.masks, rates)
    return (
        None,
        d[0] if needs[0] else None,
        d[1] if needs[1] and h0 is not None else None,
        d[2] if needs[2] and c0 is not None else None,
        *(None,) * (_FIXED - 3),
        *(d[3:] if needs[3] else [None] * len(weights)),
    )


def _keep(ctx: Any, static: _Static, tensors: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> None:
    """For backward: `tensors` as a Function takes them; out, gates and cells of the results."""
    out, _, _, _, gates, cells = results
    ctx.save_for_backward(*tensors[:_FIXED], out, gates, cells, *tensors[_FIXED:])
    needs = ctx.needs_input_grad[1:]
    ctx.static, ctx.needs = static, [*needs[:3], any(needs[_FIXED:])]
    ctx.set_materialize_grads(False)


class _RnnLayer(torch.autograd.Function):
    """Old style: about 10 us a call cheaper than the new one."""

    @staticmethod
    def forward(ctx, static, *tensors):  # type: ignore[no-untyped-def]
        x, h0, c0, lengths, resets, batch_sizes, *masks = tensors[:_FIXED]
        weights = tensors[_FIXED:]
        on, cell, batch_first, bidirectional, rates, states = static
        args = (cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, True)
        extras = static.extras(masks)
        if is_direct((x, *weights)):
            results = _kernels(on).forward(*args, extras)
        else:
            results = schema(torch.ops.fastseq.rnn_forward.default, on)(*args, extras.masks, rates, states)
        _keep(ctx, static, tensors, results)
        return results[:4]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return _backward_of(ctx, grads)


class _TransformedRnnLayer(torch.autograd.Function):
    """New style, for torch.func: batching rules exist for the operators of `reference` only."""

    @staticmethod
    def forward(static, *tensors):  # type: ignore[no-untyped-def]
        x, h0, c0, lengths, resets, batch_sizes, *masks = tensors[:_FIXED]
        on, cell, batch_first, bidirectional, rates, states = static
        return schema(torch.ops.fastseq.rnn_forward.default, on)(
            cell, x, h0, c0, tensors[_FIXED:], lengths, resets, batch_sizes, batch_first, bidirectional, True,
            static.extras(masks).masks, rates, states,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        static, *tensors = inputs
        ctx.mark_non_differentiable(*output[4:])
        _keep(ctx, static, tensors, output)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return _backward_of(ctx, grads[:4])

    @staticmethod
    def vmap(info, in_dims, static, *tensors):  # type: ignore[no-untyped-def]
        _, cell, batch_first, bidirectional, _, _ = static

        def layer(x, h0, c0, lengths, resets, batch_sizes, *rest):  # type: ignore[no-untyped-def]
            results = reference.layer(
                cell, x, h0, c0, rest[4:], lengths, resets, batch_sizes, batch_first, bidirectional,
                static.extras(rest[:4]),
            )  # fmt: skip
            return _complete(x, (*results, None, None))

        return torch.vmap(layer, in_dims[1:], randomness=info.randomness)(*tensors), (0,) * 6


def rnn_layer(
    cell: str,  # a key of ops/cells.py's CELLS
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H]
    c0: Tensor | None,
    weights: Sequence[Tensor],  # D times w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh)
    lengths: Tensor | None,  # [B] int64 on the CPU; otherwise int32 or int64 on x's device
    resets: Tensor | None,  # [T, B] bool on x's device, [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T] int64 on the CPU
    batch_first: bool,
    bidirectional: bool,
    extras: Extras = NONE,
    on: str = "cpu",
    frozen: PackedLayer | None = None,  # on the CPU only
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer on fused kernels, differentiable: out, h_n, c_n of an LSTM, and its c of every step if asked for."""
    # Constants where there is no noise: torch.compile(dynamic=True) makes symbols of an object's floats, and within a
    # Function they cannot be compared.
    rates = (1.0, 0.0, 0.0) if extras.silent else extras.rates
    static = _Static(on, cell, batch_first, bidirectional, rates, extras.states)
    args = (cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional)
    tensors = (x, h0, c0, lengths, resets, batch_sizes, *extras[:4], *weights)
    if torch.autograd.forward_ad._current_level >= 0:  # the kernels carry no tangents
        return reference.layer(*args, extras)
    results: Any
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        results = _TransformedRnnLayer.apply(static, *tensors)
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        results = _RnnLayer.apply(static, *distinct(*tensors))
    elif not is_direct((x, *weights)):
        forward = schema(torch.ops.fastseq.rnn_forward.default, on)
        results = forward(*args, False, extras.masks, extras.rates, extras.states)
    else:
        packed = () if frozen is None else (frozen.packed(cell, weights),)
        results = _kernels(on).forward(*args, False, extras, *packed)
    out, h_n, c_n, c_out = results[:4]
    lstm = CELLS[cell].cell_state
    return out, h_n, c_n if lstm else None, c_out if lstm and extras.states else None
