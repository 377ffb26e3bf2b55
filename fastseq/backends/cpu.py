"""The fused CPU kernels: csrc/cpu through fastseq/ops."""

import torch
from torch import Tensor

from .. import _native
from ..ops.common import is_direct
from ..ops.rnn import rnn_layer
from ..ops.step import StepShape, rnn_step
from . import stack
from .call import RnnCall

__all__ = ["NAME", "refuses", "rnn", "rnn_cell", "unavailable"]

NAME = "cpu"


def unavailable() -> str | None:
    return _native.reason


def refuses(call: RnnCall) -> str | None:
    if call.input.device.type != "cpu":
        return f"the input is on {call.input.device}; these kernels run on the CPU"
    if call.input.dtype not in (torch.float32, torch.bfloat16):
        return f"the input is {call.input.dtype}; these kernels take float32 and bfloat16"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace cannot record these kernels"
    if call.proj_size:
        return f"proj_size={call.proj_size} is not fused"
    if call.cell == "gru_reset_before":
        return "gru_reset_before has no fused sequence kernel"
    return None


def rnn(call: RnnCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    x = call.input
    if (
        x.dim() == 3
        and x.shape[1 if call.batch_first else 0] == 1
        and call.lengths is None
        and call.num_layers == 1
        and not call.bidirectional
        and _steps_directly(call)
    ):
        rows, row = (x.shape[0], x.stride(0)) if call.batch_first else (x.shape[1], x.stride(1))
        hidden = call.weights[1].shape[1]
        shape = StepShape(call.cell, rows, row, (1, rows, hidden), (*x.shape[:2], hidden))
        out, *state = rnn_step(shape, x, call.h0, call.c0, call.weights)
        return out, tuple(state)
    return stack.run(call, rnn_layer)


def rnn_cell(call: RnnCall) -> tuple[Tensor, ...]:
    x = call.input
    if _steps_directly(call):
        rows, hidden = x.shape[0], call.weights[1].shape[1]
        shape = StepShape(call.cell, rows, x.stride(0), (rows, hidden), None)
        return rnn_step(shape, x, call.h0, call.c0, call.weights)
    h0 = None if call.h0 is None else call.h0[None]
    c0 = None if call.c0 is None else call.c0[None]
    _, h_n, c_n = rnn_layer(call.cell, x[None], h0, c0, call.weights, None, None, False, False)
    return (h_n[0],) if c_n is None else (h_n[0], c_n[0])


def _steps_directly(call: RnnCall) -> bool:
    """Whether one step of `call` may skip the operator: eager, and every tensor as the kernel reads it."""
    x, h0, c0 = call.input, call.h0, call.c0
    return (
        is_direct((x, *call.weights))
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        and (h0 is None or (h0.dtype == x.dtype and h0.is_contiguous()))
        and (c0 is None or (c0.dtype == x.dtype and c0.is_contiguous()))
        and all(w.is_contiguous() for w in call.weights)
    )
