"""Attention on the fused CPU kernels: csrc/cpu through fastseq/ops."""

import torch
from torch import Tensor

from .. import _native
from ..ops import attention as ops
from ..ops.linear import linear
from . import decoder_reference
from .decoder_call import AttentionCall

__all__ = ["NAME", "attention", "refuses_attention", "unavailable"]

NAME = "cpu"


def unavailable() -> str | None:
    return _native.reason


def refuses_attention(call: AttentionCall) -> str | None:
    query = call.query
    if query.device.type != "cpu":
        return f"the query is on {query.device}; these kernels run on the CPU"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"the query is {query.dtype}; these kernels take float32 and bfloat16"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "torch.jit.trace cannot record these kernels"
    if call.window is not None:
        return f"window={call.window} (local-p) is not fused"
    return None


def attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    if _transformed():
        return decoder_reference.attention(call)
    keys, params = call.keys, call.params
    assert keys.keys is not None  # since the call was checked
    assert keys.memory is not None
    q = call.query if params.query is None else linear(call.query, params.query)
    return ops.attention(q, keys.keys, keys.memory, keys.mask, params.v, call.need_weights)


def _transformed() -> bool:
    """Whether torch.func or forward-mode gradients see this call: the kernels carry neither batches nor tangents."""
    return torch.autograd.forward_ad._current_level >= 0 or (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    )
