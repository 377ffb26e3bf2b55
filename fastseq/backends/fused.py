"""What the backends on fused kernels share: which calls go through a whole layer, which through one step at once."""

from functools import partial

import torch
from torch import Tensor

from ..ops.common import is_direct
from ..ops.packed import PACKED_PRODUCTS, PackedLayer, unwatched
from ..ops.rnn import rnn_layer
from ..ops.rnn_norm import rnn_norm_layer
from ..ops.step import StepShape, rnn_step
from . import stack
from .call import Results, RnnCall

__all__ = ["never", "not_fused", "rnn", "rnn_cell", "without_frozen"]


def not_fused(call: RnnCall) -> str | None:
    """Why no fused kernels can run `call`, on whatever device."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace cannot record these kernels"
    return never(call)


def never(call: RnnCall) -> str | None:
    """What of a layer's own options they can never run."""
    if call.proj_size:
        return f"proj_size={call.proj_size} is not fused"
    if call.cell == "gru_reset_before":
        return "gru_reset_before has no fused sequence kernel"
    return None


def rnn(call: RnnCall, on: str) -> Results:
    """A layer stack on the kernels of backend `on`."""
    if call.norms is not None:
        return stack.run(call, partial(rnn_norm_layer, on=on))
    x = call.input
    one_step = x.dim() == 3 and x.shape[1 if call.batch_first else 0] == 1 and call.lengths is None
    one_step = one_step and call.noise is None and not call.states
    if one_step and call.resets is not None and not call.bidirectional:
        _reset(call, call.resets)
    one_step = one_step and call.num_layers == 1 and not call.bidirectional
    if one_step and on != "cpu":
        x = _make_dense(call)
    if one_step and _steps_directly(call, on):
        rows, row = (x.shape[0], x.stride(0)) if call.batch_first else (x.shape[1], x.stride(1))
        hidden = call.weights[1].shape[1]
        shape = StepShape(call.cell, rows, row, (1, rows, hidden), (*x.shape[:2], hidden))
        out, *state = rnn_step(shape, x, call.h0, call.c0, call.weights, on, _frozen(call, on))
        return out, tuple(state)
    return stack.run(call, partial(rnn_layer, on=on), call.frozen if on == "cpu" else None)


def rnn_cell(call: RnnCall, on: str) -> tuple[Tensor, ...]:
    """One step on the kernels of backend `on`."""
    x = call.input if on == "cpu" else _make_dense(call)
    if _steps_directly(call, on):
        rows, hidden = x.shape[0], call.weights[1].shape[1]
        shape = StepShape(call.cell, rows, x.stride(0), (rows, hidden), None)
        return rnn_step(shape, x, call.h0, call.c0, call.weights, on, _frozen(call, on))
    h0 = None if call.h0 is None else call.h0[None]
    c0 = None if call.c0 is None else call.c0[None]
    _, h_n, c_n, _ = rnn_layer(
        call.cell, x[None], h0, c0, call.weights, None, None, None, False, False, on=on, frozen=_frozen(call, on)
    )  # fmt: skip
    return (h_n[0],) if c_n is None else (h_n[0], c_n[0])


def _frozen(call: RnnCall, on: str) -> PackedLayer | None:
    """Of the only layer."""
    return None if call.frozen is None or on != "cpu" else call.frozen[0]


def without_frozen(call: RnnCall) -> str | None:
    """Why the CPU kernels would run `call`, of a frozen module, without its packed weights."""
    if call.norms is not None:
        return "the kernels of layer normalisation pack them in each call"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "within a transform of torch.func or forward-mode gradients"
    given = (call.input, call.h0, call.c0, *call.weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return "gradients are recorded; use torch.no_grad()"
    if not is_direct((call.input, *call.weights)):
        return "a tensor is of a subclass, or a mode is active"
    small = call.batch * call.hidden_size * (call.input.shape[-1] + call.hidden_size) < PACKED_PRODUCTS
    if small and call.steps == 1 and call.num_layers == 1 and not call.bidirectional and _steps_directly(call, "cpu"):
        return "one step of so few numbers reads the weights as they stand"
    return unwatched(call.weights)


def _reset(call: RnnCall, resets: Tensor) -> None:
    """Of a single forward step resets only choose the initial state: then it is one without them, the short way."""
    rows = resets.reshape(-1, 1)  # [B, 1]
    call.h0, call.c0 = (None if s is None else torch.where(rows, 0.0, s) for s in (call.h0, call.c0))
    call.resets = None


def _make_dense(call: RnnCall) -> Tensor:
    """Its input. Tensors that the kernel of a step cannot read as they lie are copied: a layer's are more launches, and
    to be compiled.
    """
    x, h0, c0 = call.input, call.h0, call.c0
    call.input = x if x.stride(-1) == 1 else x.contiguous()
    call.h0, call.c0 = (None if s is None else s.contiguous() for s in (h0, c0))
    call.weights = [w.contiguous() for w in call.weights]
    return call.input


def _steps_directly(call: RnnCall, on: str) -> bool:
    """Whether one step of `call` may skip the operator: eager, and every tensor as the kernel reads it."""
    x, h0, c0 = call.input, call.h0, call.c0
    return (
        is_direct((x, *call.weights))
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        and (h0 is None or ((h0.dtype == x.dtype or on != "cpu") and h0.is_contiguous()))
        and (c0 is None or ((c0.dtype == x.dtype or on != "cpu") and c0.is_contiguous()))
        and all(w.is_contiguous() for w in call.weights)
    )
