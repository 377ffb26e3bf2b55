"""One recurrent layer as an operator: `torch.ops.fastseq.rnn_forward`, `rnn_backward` and their autograd.

Letters: T steps, B rows, N tokens of a packed batch, I input features, H units, D directions, G gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..backends import reference
from .cells import CELLS
from .common import Kernels, address, distinct, gpu_kernels, is_direct, schema, through_reference
from .packed import PackedLayer

__all__ = ["rnn_layer"]

# x [T, B, I], [B, T, I] if batch_first, or packed [N, I]. h0, c0 [D, B, H], in x's dtype or fp32. weights: D times
# w_ih, w_hh (, b_ih, b_hh). resets [T, B] bool, [B, T] if batch_first: rows start there from zeros, in the reverse
# direction at the step before. out in x's layout, D * H features; h_n, c_n [D, B, H]. Saved for backward: gates
# [D, tokens, columns, H] in x's dtype, cells [D, tokens, H] in fp32 (LSTM), tokens = T * B or N; of them the active
# ones come first, in step order, longest row first.
_LIBRARY = torch.library.Library("fastseq", "DEF")
_LIBRARY.define(
    "rnn_forward(str cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? resets, "
    "Tensor? batch_sizes, bool batch_first, bool bidirectional, bool save, *, str on='') "
    "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
# needs: x, h0, c0, weights. Returns d_x, d_h0, d_c0, then one a weight; those not needed are empty.
_LIBRARY.define(
    "rnn_backward(str cell, Tensor? d_out, Tensor? d_h_n, Tensor? d_c_n, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, bool batch_first, bool bidirectional, "
    "Tensor out, Tensor gates, Tensor cells, bool[] needs, *, str on='') -> Tensor[]"
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
    batch_first: bool, bidirectional: bool, save: bool, zero: bool, rows: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Empty results of rnn_forward, None for those this call has not; `zero` clears out, for rows that end early."""
    dirs, hidden = (2 if bidirectional else 1), weights[1].shape[1]
    shape = (*x.shape[:-1], dirs * hidden)
    out = x.new_zeros(shape) if zero else x.new_empty(shape)
    lstm = CELLS[cell].cell_state
    h_n = (x if h0 is None else h0).new_empty((dirs, rows, hidden))
    c_n = torch.empty_like(h_n) if lstm else None
    if not save:
        return out, h_n, c_n, None, None
    tokens = _tokens(x, batch_sizes)
    gates = x.new_empty((dirs, tokens, CELLS[cell].columns, hidden))
    cells = x.new_empty((dirs, tokens, hidden), dtype=torch.float32) if lstm else None
    return out, h_n, c_n, gates, cells


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
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    assert _native.C is not None
    x, (h0, c0) = _dense(x), _states(h0, c0)
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    steps, rows, step, row = _dims(x, batch_sizes, batch_first, None if h0 is None else h0.shape[1])
    results = _outputs(cell, x, h0, weights, batch_sizes, batch_first, bidirectional, save, lengths is not None, rows)
    out, h_n, c_n, gates, cells = results
    _, _, out_step, out_row = _dims(out, batch_sizes, batch_first, rows)
    _native.C.rnn_forward(
        CELLS[cell].number, x.dtype is torch.bfloat16, h_n.dtype is torch.float32, steps, rows, _tokens(x, batch_sizes),
        x.shape[-1], weights[1].shape[1], address(lengths), address(batch_sizes), (x.data_ptr(), step, row),
        (out.data_ptr(), out_step, out_row), tuple([w.data_ptr() for w in weights]), 2 if bidirectional else 1,
        address(h0), address(c0), h_n.data_ptr(), address(c_n), address(gates), address(cells), torch.get_num_threads(),
        _view(resets, None, batch_first, rows), tuple([p.data_ptr() for p in packed]),
    )  # fmt: skip
    return results


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
    cell: str, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, x: Tensor, h0: Tensor | None,
    c0: Tensor | None, weights: Sequence[Tensor], lengths: Tensor | None, resets: Tensor | None,
    batch_sizes: Tensor | None, batch_first: bool, bidirectional: bool, out: Tensor, gates: Tensor, cells: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    assert _native.C is not None
    x, weights = _dense(x), [w.contiguous() for w in weights]
    results = _gradients(x, h0, c0, weights, needs, lengths is not None)
    state_dtype = x.dtype if h0 is None else h0.dtype
    h0, c0 = _states(h0, c0)
    d_h_n, d_c_n = (None if g is None else g.to(state_dtype).contiguous() for g in (d_h_n, d_c_n))
    if d_out is not None:
        d_out = _dense(d_out.to(x.dtype))
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
    )  # fmt: skip
    return results


def _fake_forward(  # type: ignore[no-untyped-def]
    cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, save, on="",
):  # fmt: skip
    if batch_sizes is None:
        rows = x.shape[0 if batch_first else 1]
    else:
        rows = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[1]
    return _complete(
        x, _outputs(cell, x, h0, weights, batch_sizes, batch_first, bidirectional, save, False, rows)
    )  # fmt: skip


def _fake_backward(  # type: ignore[no-untyped-def]
    cell, d_out, d_h_n, d_c_n, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, out, gates,
    cells, needs, on="",
):  # fmt: skip
    return _gradients(x, h0, c0, weights, needs, False)


_NATIVE = Kernels(_forward, _backward)


def _kernels(on: str) -> Kernels:
    return _NATIVE if on == "cpu" else gpu_kernels(on, "rnn")


def _forward_operator(default: str) -> Any:
    def forward(cell, x, *args, on=""):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return _complete(x, _kernels(on or default).forward(cell, x, *args))

    return forward


def _backward_operator(default: str) -> Any:
    def backward(*args, on=""):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return _kernels(on or default).backward(*args)

    return backward


for _on, _key in (("cpu", "CPU"), ("triton", "CUDA")):
    _LIBRARY.impl("rnn_forward", _forward_operator(_on), _key)
    _LIBRARY.impl("rnn_backward", _backward_operator(_on), _key)
torch.library.register_fake("fastseq::rnn_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fastseq::rnn_backward", _fake_backward, lib=_LIBRARY)


def _backward_of(ctx: Any, static: tuple[Any, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of x, h0, c0, then the weights, from what a Function saved."""
    x, h0, c0, lengths, resets, batch_sizes, out, gates, cells, *weights = ctx.saved_tensors
    if all(g is None for g in grads):
        return [None] * (3 + len(weights))
    on, cell, batch_first, bidirectional = static
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():

        def forward(x, h0, c0, *weights):  # type: ignore[no-untyped-def]
            return reference.layer(cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional)

        return through_reference(forward, (x, h0, c0, *weights), grads)
    needs = ctx.needs
    if is_direct((x, *weights)):
        run = _kernels(on).backward
    else:
        run = schema(torch.ops.fastseq.rnn_backward.default, on)
        cells = x.new_empty(0) if cells is None else cells
    d_out, d_h_n, d_c_n = grads
    d = run(
        cell, d_out, d_h_n, d_c_n, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, out,
        gates, cells, needs,
    )  # fmt: skip
    return [
        d[0] if needs[0] else None,
        d[1] if needs[1] and h0 is not None else None,
        d[2] if needs[2] and c0 is not None else None,
        *(d[3:] if needs[3] else [None] * len(weights)),
    ]


class _RnnLayer(torch.autograd.Function):
    """Old style: about 10 us a call cheaper than the new one."""

    @staticmethod
    def forward(ctx, static, x, h0, c0, lengths, resets, batch_sizes, *weights):  # type: ignore[no-untyped-def]
        on, cell, batch_first, bidirectional = static
        run = _kernels(on).forward if is_direct((x, *weights)) else schema(torch.ops.fastseq.rnn_forward.default, on)
        out, h_n, c_n, gates, cells = run(
            cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, True
        )
        ctx.save_for_backward(x, h0, c0, lengths, resets, batch_sizes, out, gates, cells, *weights)
        ctx.static = static
        needs = ctx.needs_input_grad
        ctx.needs = [needs[1], needs[2], needs[3], any(needs[7:])]
        ctx.set_materialize_grads(False)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx, d_out, d_h_n, d_c_n):  # type: ignore[no-untyped-def]
        d_x, d_h0, d_c0, *d_weights = _backward_of(ctx, ctx.static, (d_out, d_h_n, d_c_n))
        return None, d_x, d_h0, d_c0, None, None, None, *d_weights


class _TransformedRnnLayer(torch.autograd.Function):
    """New style, for torch.func: batching rules exist for the operators of `reference` only."""

    @staticmethod
    def forward(static, x, h0, c0, lengths, resets, batch_sizes, *weights):  # type: ignore[no-untyped-def]
        on, cell, batch_first, bidirectional = static
        return schema(torch.ops.fastseq.rnn_forward.default, on)(
            cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, True
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        static, x, h0, c0, lengths, resets, batch_sizes, *weights = inputs
        out, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.save_for_backward(x, h0, c0, lengths, resets, batch_sizes, out, gates, cells, *weights)
        ctx.static = static
        needs = ctx.needs_input_grad
        ctx.needs = [needs[1], needs[2], needs[3], any(needs[7:])]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_out, d_h_n, d_c_n, _gates, _cells):  # type: ignore[no-untyped-def]
        d_x, d_h0, d_c0, *d_weights = _backward_of(ctx, ctx.static, (d_out, d_h_n, d_c_n))
        return None, d_x, d_h0, d_c0, None, None, None, *d_weights

    @staticmethod
    def vmap(info, in_dims, static, x, h0, c0, lengths, resets, batch_sizes, *weights):  # type: ignore[no-untyped-def]
        _, cell, batch_first, bidirectional = static

        def layer(x, h0, c0, lengths, resets, batch_sizes, *weights):  # type: ignore[no-untyped-def]
            out, h_n, c_n = reference.layer(
                cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional
            )
            none = x.new_empty(0)
            return out, h_n, none if c_n is None else c_n, none, none

        args = (x, h0, c0, lengths, resets, batch_sizes, *weights)
        return torch.vmap(layer, in_dims[1:], randomness=info.randomness)(*args), (0, 0, 0, 0, 0)


def rnn_layer(
    cell: str,  # "lstm" | "gru"
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H]
    c0: Tensor | None,
    weights: Sequence[Tensor],  # D times w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh)
    lengths: Tensor | None,  # [B] int64 on the CPU; otherwise int32 or int64 on x's device
    resets: Tensor | None,  # [T, B] bool on x's device, [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T] int64 on the CPU
    batch_first: bool,
    bidirectional: bool,
    on: str = "cpu",
    frozen: PackedLayer | None = None,  # on the CPU only
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer on fused kernels, differentiable: out, h_n, c_n (None for a GRU), as the schema above says."""
    static = (on, cell, batch_first, bidirectional)
    if torch.autograd.forward_ad._current_level >= 0:  # the kernels carry no tangents
        out, h_n, c_n = reference.layer(
            cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional
        )
    elif not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        out, h_n, c_n = _TransformedRnnLayer.apply(static, x, h0, c0, lengths, resets, batch_sizes, *weights)[:3]
    elif torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        out, h_n, c_n = _RnnLayer.apply(static, *distinct(x, h0, c0, lengths, resets, batch_sizes, *weights))
    elif not is_direct((x, *weights)):
        out, h_n, c_n, _, _ = schema(torch.ops.fastseq.rnn_forward.default, on)(
            cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, False
        )
    else:
        packed = () if frozen is None else (frozen.packed(cell, weights),)
        out, h_n, c_n, _, _ = _kernels(on).forward(
            cell, x, h0, c0, weights, lengths, resets, batch_sizes, batch_first, bidirectional, False, *packed
        )
    return out, h_n, c_n if cell == "lstm" else None
