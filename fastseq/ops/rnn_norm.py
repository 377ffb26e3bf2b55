"""One direction of a layer-normalised layer as an operator: `torch.ops.fastseq.rnn_norm_forward`, `rnn_norm_backward`
and their autograd. Equations: backends/reference.py.

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
    through_reference,
)
from .extras import NONE, Extras
from .linear import input_gradient, product, weight_gradient
from .rnn import _complete, _dense, _dims, _states, _tokens, _view, noise_arguments

__all__ = ["GIVEN", "STATS", "Given", "norm_gradients", "norm_outputs", "rnn_norm_layer"]

# As in rnn.py, but of one direction: h0, c0, h_n, c_n [1, B, H]. weights: w_ih, w_hh (, b_ih, b_hh). norms: the gains
# of N(W_ih x) and N(W_hh h) [G*H], of an LSTM gain and bias of N(c) [H]. What stands in x behind a row's length must be
# finite. Saved for backward: hats_x [.., G*H], N(W_ih x) in x's layout, and for T * B or N tokens in an order of the
# kernels' own hats [tokens, G*H], N(W_hh h), and gates [tokens, columns, H] in x's dtype, cells [tokens, H] (LSTM) and
# stats [tokens, 5] in fp32. masks, rates, states: this direction's share of extras.py's; c_out is empty without states.
_LIBRARY = torch.library.Library("fastseq", "FRAGMENT")
_GIVEN = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? resets, Tensor? batch_sizes, Tensor[] weights, "
    "Tensor[] norms, bool batch_first, bool reverse, Tensor?[] masks, float[] rates"
)
_LIBRARY.define(
    f"rnn_norm_forward(str cell, {_GIVEN}, bool states, bool save) -> (Tensor out, Tensor h_n, Tensor c_n, "
    "Tensor hats_x, Tensor hats, Tensor gates, Tensor cells, Tensor stats, Tensor c_out)"
)
# needs: x, h0, c0, weights. Returns d_x, d_h0, d_c0, one a weight, one a norm; those not needed are empty.
_LIBRARY.define(
    f"rnn_norm_backward(str cell, Tensor? d_out, Tensor? d_h_n, Tensor? d_c_n, Tensor? d_c_out, {_GIVEN}, Tensor out, "
    "Tensor hats_x, Tensor hats, Tensor gates, Tensor cells, Tensor stats, bool[] needs) -> Tensor[]"
)
STATS = 5
GIVEN = 12  # fields of `Given`


class Given(NamedTuple):
    """What both operators take, as in their schemas."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    batch_sizes: Tensor | None
    weights: Sequence[Tensor]
    norms: Sequence[Tensor]
    batch_first: bool
    reverse: bool
    masks: Sequence[Tensor | None]
    rates: Sequence[float]

    @property
    def extras(self) -> Extras:
        return Extras.of(self.masks, self.rates, False)

    @property
    def hidden(self) -> int:
        return self.weights[1].shape[1]

    def view(self, t: Tensor | None, rows: int) -> tuple[int, int, int]:
        """For the native module, of what is laid out as x."""
        return _view(t, self.batch_sizes, self.batch_first, rows)


def norm_outputs(cell: str, given: Given, states: bool, save: bool, zero: bool, rows: Any) -> list[Tensor | None]:
    """Empty results of rnn_norm_forward, None for those this call has not; `zero` clears out, for rows that end early.
    hats_x is left to the caller.
    """
    x, kind, hidden = given.x, CELLS[cell], given.hidden
    shape = (*x.shape[:-1], hidden)
    out = x.new_zeros(shape) if zero else x.new_empty(shape)
    h_n = (x if given.h0 is None else given.h0).new_empty((1, rows, hidden))
    c_n = torch.empty_like(h_n) if kind.cell_state else None
    c_out = None if not (kind.cell_state and states) else torch.zeros_like(out) if zero else torch.empty_like(out)
    if not save:
        return [out, h_n, c_n, None, None, None, None, None, c_out]
    tokens = _tokens(x, given.batch_sizes)
    hats, gates = x.new_empty((tokens, kind.gates * hidden)), x.new_empty((tokens, kind.columns, hidden))
    cells = x.new_empty((tokens, hidden), dtype=torch.float32) if kind.cell_state else None
    return [out, h_n, c_n, None, hats, gates, cells, x.new_empty((tokens, STATS), dtype=torch.float32), c_out]


def norm_gradients(given: Given, needs: Sequence[bool]) -> list[Tensor]:
    """Empty results of rnn_norm_backward."""
    states = [t if need else None for t, need in zip((given.x, given.h0, given.c0), needs, strict=False)]
    weights = [*given.weights, *given.norms] if needs[3] else [None] * (len(given.weights) + len(given.norms))
    return [given.x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (*states, *weights)]


def _call(cell: str, given: Given, state: torch.dtype, rows: int, **more: Tensor | None) -> tuple[Any, Any]:
    """Sizes, and addresses by name, as the native module takes them."""
    x = given.x
    sizes = {
        "cell": CELLS[cell].number, "dtype": x.dtype is torch.bfloat16, "hidden": given.hidden,
        "state_is_f32": state is torch.float32, "rows": rows, "reverse": given.reverse,
        "steps": _dims(x, given.batch_sizes, given.batch_first, rows)[0], "threads": torch.get_num_threads(),
    }  # fmt: skip
    _, w_hh, *biases = given.weights
    bias_x, bias = biases or (None, None)
    gain_x, gain, cell_gain, cell_bias = (*given.norms, None, None)[:4]
    tensors = {
        "h0": given.h0, "c0": given.c0, "lengths": given.lengths, "batch_sizes": given.batch_sizes, "w_hh": w_hh,
        "bias": bias, "bias_x": bias_x, "gain": gain, "gain_x": gain_x, "cell_gain": cell_gain, "cell_bias": cell_bias,
    }  # fmt: skip
    return sizes, {name: address(t) for name, t in (tensors | more).items()}


def _noise(given: Given, rows: int) -> tuple[Any, ...]:
    return noise_arguments(given.extras, given.batch_sizes, given.batch_first, rows)


def _contiguous(given: Given) -> Given:
    weights, norms = ([t.contiguous() for t in of] for of in given[6:8])
    h0, c0 = _states(given.h0, given.c0)
    return given._replace(x=_dense(given.x), h0=h0, c0=c0, weights=weights, norms=norms)


def _forward(cell: str, *args: Any) -> list[Tensor | None]:
    assert _native.C is not None
    *options, states, save = args
    given = _contiguous(Given(*options))
    rows = _dims(given.x, given.batch_sizes, given.batch_first, None if given.h0 is None else given.h0.shape[1])[1]
    results = norm_outputs(cell, given, states, save, given.lengths is not None, rows)
    out, h_n, c_n, _, hats, gates, cells, stats, c_out = results
    assert h_n is not None
    products = product(given.x, given.weights[0])  # in the end N of them, if the kernel saves
    views = {"inputs": given.view(products, rows), "out": given.view(out, rows)}
    views |= {"resets": _view(given.resets, None, given.batch_first, rows), "c_out": given.view(c_out, rows)}
    saved = {"hats": hats, "gates": gates, "cells": cells, "stats": stats}
    _native.C.rnn_norm_forward(
        *_call(cell, given, h_n.dtype, rows, h_n=h_n, c_n=c_n, **saved), views, _noise(given, rows)
    )
    results[3] = products if save else None
    return results


def _backward(
    cell: str, d_out: Tensor | None, d_h_n: Tensor | None, d_c_n: Tensor | None, d_c_out: Tensor | None, *args: Any
) -> list[Tensor]:  # fmt: skip
    assert _native.C is not None
    state = args[0].dtype if args[1] is None else args[1].dtype
    given = _contiguous(Given(*args[:GIVEN]))
    out, hats_x, hats, gates, cells, stats, needs = args[GIVEN:]
    x, results = given.x, norm_gradients(given, needs)
    d_x, d_h0, d_c0, d_w_ih, d_w_hh = results[:5]
    d_h_n, d_c_n = (None if g is None else g.to(state).contiguous() for g in (d_h_n, d_c_n))
    d_out, d_c_out = (None if g is None else _dense(g.to(x.dtype)) for g in (d_out, d_c_out))
    rows = out.shape[1 - given.batch_first] if given.batch_sizes is None else int(given.batch_sizes[0])
    d_inputs = torch.zeros_like(hats_x) if given.lengths is not None else torch.empty_like(hats_x)
    d_products, before = torch.empty_like(hats), x.new_empty((hats.shape[0], given.hidden))
    sums = x.new_empty(4 * hats.shape[1] + 2 * given.hidden, dtype=torch.float32)
    views = {"inputs": given.view(hats_x, rows), "out": given.view(out, rows), "d_out": given.view(d_out, rows)}
    views |= {"d_inputs": given.view(d_inputs, rows), "resets": _view(given.resets, None, given.batch_first, rows)}
    views["d_c_out"] = given.view(d_c_out, rows)
    sizes, tensors = _call(
        cell, given, state, rows, hats=hats, gates=gates, cells=cells, stats=stats, d_h_n=d_h_n, d_c_n=d_c_n,
        d_products=d_products, before=before, d_h0=d_h0 if d_h0.numel() else None,
        d_c0=d_c0 if d_c0.numel() else None, d_sums=sums,
    )  # fmt: skip
    _native.C.rnn_norm_backward(sizes, tensors, views, _noise(given, rows))
    if needs[0]:
        input_gradient(d_inputs, given.weights[0], d_x)
    if needs[3]:
        weight_gradient(d_inputs, x, d_w_ih)
        active = hats.shape[0] if given.lengths is None else int(given.lengths.sum())  # these come first
        weight_gradient(d_products[:active], before[:active], d_w_hh)
        results[5:] = spread_sums(sums, given.weights, given.norms)
    return results


def spread_sums(sums: Tensor, weights: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of (b_ih, b_hh,) norm_ih, norm_hh (, norm_c, norm_c_bias), of which no two share memory, from the
    kernels' fp32 sums: those of norm_hh, b_hh, norm_ih, b_ih [G*H], norm_c, norm_c_bias [H].
    """
    gates, hidden = weights[1].shape
    of_hh, b_hh, of_ih, b_ih = (sums.narrow(0, k * gates, gates) for k in range(4))
    found = [b_ih, b_hh] if len(weights) > 2 else []
    found += [of_ih, of_hh, *(sums.narrow(0, 4 * gates + k * hidden, hidden) for k in range(len(norms) - 2))]
    return [t.to(weights[1].dtype, copy=True) for t in found]


_NATIVE = Kernels(_forward, _backward)


def _kernels(on: str) -> Kernels:
    return _NATIVE if on == "cpu" else gpu_kernels(on, "rnn_norm")


def _fake_forward(cell, *args):  # type: ignore[no-untyped-def]
    *options, states, save = args
    given = Given(*options)
    rows: Any = given.x.shape[0 if given.batch_first else 1] if given.batch_sizes is None else None
    if rows is None:
        rows = torch.library.get_ctx().new_dynamic_size() if given.h0 is None else given.h0.shape[1]
    results = norm_outputs(cell, given, states, save, False, rows)
    if save:
        results[3] = given.x.new_empty((*given.x.shape[:-1], given.weights[0].shape[0]))
    return _complete(given.x, results)


def _fake_backward(cell, d_out, d_h_n, d_c_n, d_c_out, *args):  # type: ignore[no-untyped-def]
    return norm_gradients(Given(*args[:GIVEN]), args[-1])


def _operators(on: str) -> tuple[Any, Any]:
    def forward(cell, *args):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return _complete(args[0], _kernels(on).forward(cell, *args))

    def backward(*args):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return _kernels(on).backward(*args)

    return forward, backward


for _on, _key in (("cpu", "CPU"), ("triton", "CUDA")):
    for _name, _function in zip(("rnn_norm_forward", "rnn_norm_backward"), _operators(_on), strict=True):
        _LIBRARY.impl(_name, _function, _key)
torch.library.register_fake("fastseq::rnn_norm_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fastseq::rnn_norm_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("fastseq::rnn_norm_forward", not_recorded, lib=_LIBRARY)


class _Static(NamedTuple):
    """What of a direction is no tensor."""

    on: str
    cell: str
    batch_first: bool
    reverse: bool
    rates: tuple[float, float, float]
    states: bool
    silent: bool  # then the masks are None and the rates say nothing
    weights: int  # among the tensors, the norms come behind them

    def given(self, tensors: Sequence[Any]) -> Given:
        x, h0, c0, lengths, resets, batch_sizes, *masks = tensors[:_FIXED]
        weights, norms = tensors[_FIXED : _FIXED + self.weights], tensors[_FIXED + self.weights :]
        return Given(
            x, h0, c0, lengths, resets, batch_sizes, weights, norms, self.batch_first, self.reverse,
            [] if self.silent else masks, self.rates,
        )  # fmt: skip


_FIXED = 10  # of a direction's tensors, in front of weights and norms


class _NormDirection(torch.autograd.Function):
    """Old style, as ops/rnn.py's; of x, h0, c0, lengths, resets, batch_sizes, four masks, weights and norms."""

    @staticmethod
    def forward(ctx, static, *tensors):  # type: ignore[no-untyped-def]
        results = _run_forward(static, tensors, True)
        out, h_n, c_n, *saved, c_out = results
        ctx.save_for_backward(*tensors, out, *saved)
        needs = ctx.needs_input_grad[1:]
        ctx.static, ctx.needs = static, [*needs[:3], any(needs[_FIXED:])]
        ctx.set_materialize_grads(False)
        return out, h_n, c_n, c_out

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        static, needs, saved = ctx.static, ctx.needs, saved_by(ctx)
        tensors, results = saved[:-6], saved[-6:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(tensors))
        given = static.given(tensors)
        if needs_recording(grads):
            fixed = tensors[3 : _FIXED - 1]  # but for the mask of h before W_hh, which second derivatives multiply

            def forward(x, h0, c0, recurrent, *parameters):  # type: ignore[no-untyped-def]
                return _reference(static, (x, h0, c0, *fixed, recurrent, *parameters))

            taken = (*tensors[:3], *tensors[_FIXED - 1 :])
            d_x, d_h0, d_c0, _, *d = through_reference(forward, taken, grads)
            return None, d_x, d_h0, d_c0, *(None,) * (_FIXED - 3), *d
        args = (static.cell, *grads, *given, *results, needs)
        if is_direct((given.x, *given.weights)):
            d = _kernels(static.on).backward(*args)
        else:
            results = [given.x.new_empty(0) if r is None else r for r in results]
            d = torch.ops.fastseq.rnn_norm_backward.default(static.cell, *grads, *given, *results, needs)
        there = (needs[0], needs[1] and given.h0 is not None, needs[2] and given.c0 is not None)
        states = (g if t else None for g, t in zip(d, there, strict=False))
        rest = d[3:] if needs[3] else [None] * (len(tensors) - _FIXED)
        return None, *states, *(None,) * (_FIXED - 3), *rest


def _run_forward(static: _Static, tensors: Sequence[Any], save: bool) -> Any:
    given = static.given(tensors)
    if is_direct((given.x, *given.weights)):
        return _kernels(static.on).forward(static.cell, *given, static.states, save)
    return torch.ops.fastseq.rnn_norm_forward.default(static.cell, *given, static.states, save)


def _reference(static: _Static, tensors: Sequence[Any]) -> tuple[Tensor | None, ...]:
    given = static.given(tensors)
    x, h0, c0, lengths, resets, batch_sizes, weights, norms, batch_first, reverse = given[:10]
    return reference.norm_direction(
        static.cell, x, h0, c0, weights, norms, lengths, resets, batch_sizes, batch_first, reverse,
        given.extras._replace(states=static.states),
    )  # fmt: skip


def rnn_norm_layer(
    cell: str,  # "lstm" or "gru"
    x: Tensor,  # [T, B, I], [B, T, I] if batch_first, or packed [N, I]
    h0: Tensor | None,  # [D, B, H]
    c0: Tensor | None,
    weights: Sequence[Tensor],  # D times w_ih [G*H, I], w_hh [G*H, H] (, b_ih, b_hh)
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B] bool, [B, T] if batch_first
    batch_sizes: Tensor | None,  # [T] int64 on the CPU
    batch_first: bool,
    bidirectional: bool,
    extras: Extras = NONE,
    norms: Sequence[Tensor] = (),  # D times norm_ih, norm_hh [G*H] (, norm_c, norm_c_bias [H])
    on: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer on fused kernels, differentiable: out, h_n, c_n of an LSTM, and its c of every step if asked for."""
    transformed = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or torch.autograd.forward_ad._current_level >= 0:  # the kernels have neither vmap nor tangents
        options = (lengths, resets, batch_sizes, batch_first, bidirectional)
        return reference.layer(cell, x, h0, c0, weights, *options, extras, norms=norms)
    if lengths is not None:  # behind a length may stand NaN, which the weights' gradients would multiply by 0
        ends, steps = lengths.to(x.device), torch.arange(x.shape[1 if batch_first else 0], device=x.device)
        x = torch.where((steps < ends[:, None] if batch_first else steps[:, None] < ends)[..., None], x, 0.0)
    rows = (lengths, resets, batch_sizes)
    if not bidirectional:
        return _direction(on, cell, x, h0, c0, weights, norms, rows, batch_first, False, extras)
    both, per, gains = [], len(weights) // 2, len(norms) // 2
    for d in (0, 1):
        h, c = (None if s is None else s[d : d + 1] for s in (h0, c0))
        own, gain = weights[d * per : (d + 1) * per], norms[d * gains : (d + 1) * gains]
        share = extras.direction(d, weights[1].shape[1])
        both.append(_direction(on, cell, x, h, c, own, gain, rows, batch_first, d == 1, share))
    out, h_n = torch.cat([out for out, _, _, _ in both], -1), torch.cat([h for _, h, _, _ in both])
    c_n, c_out = ([t for t in of if t is not None] for of in list(zip(*both, strict=True))[2:])
    return out, h_n, torch.cat(c_n) if c_n else None, torch.cat(c_out, -1) if c_out else None


def _direction(
    on: str, cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor],
    norms: Sequence[Tensor], rows: tuple[Tensor | None, ...], batch_first: bool, reverse: bool, extras: Extras,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What a layer returns, of one direction; rows: lengths, resets, batch_sizes."""
    rates = (1.0, 0.0, 0.0) if extras.silent else extras.rates  # constants, as in rnn.py
    static = _Static(on, cell, batch_first, reverse, rates, extras.states, extras.silent, len(weights))
    tensors = (x, h0, c0, *rows, *extras[:4], *weights, *norms)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, h_n, c_n, c_out = _NormDirection.apply(static, *distinct(*tensors))
    else:
        out, h_n, c_n, *_, c_out = _run_forward(static, tensors, False)
    lstm = CELLS[cell].cell_state
    return out, h_n, c_n if lstm else None, c_out if lstm and extras.states else None
