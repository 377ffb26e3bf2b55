"""Attention of all queries of a sequence: `torch.ops.fastseq.attention_forward`, `attention_backward`, their autograd.

Letters: N = B * k decoder rows, of which row n reads memory row n // k; T queries a row, S positions, A units,
D features. Only the weights [N, T, S] are stored: backward computes the additive form's tanh again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..backends import decoder_reference
from ..backends.decoder_call import AttentionCall
from ..spec import AttentionParams, Keys
from .common import Kernels, address, distinct, gpu_kernels, is_direct, needs_recording, not_recorded, through_reference

__all__ = ["attention"]

_LIBRARY = torch.library.Library("fastseq", "FRAGMENT")
# fp32 or bf16; on Triton fp16 too. Without `save` weights are empty.
_LIBRARY.define(
    "attention_forward(Tensor q, Tensor keys, Tensor memory, Tensor? mask, Tensor? v, bool save) "
    "-> (Tensor context, Tensor weights)"
)
# d_v is empty where v is None.
_LIBRARY.define(
    "attention_backward(Tensor? d_context, Tensor? d_weights, Tensor q, Tensor keys, Tensor memory, Tensor? mask, "
    "Tensor? v, Tensor weights) -> (Tensor d_q, Tensor d_keys, Tensor d_memory, Tensor d_v)"
)


def attention(
    q: Tensor,  # [N, T, A], already projected
    keys: Tensor,  # [B, S, A]
    memory: Tensor,  # [B, S, D]
    mask: Tensor | None,  # [B, S] bool, True = attend
    v: Tensor | None,  # [A] of the additive form; None: the dot form
    need_weights: bool,
    on: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Context [N, T, D] and weights [N, T, S] or None on a fused kernel, differentiable; both in q's dtype."""
    inputs = (q, keys, memory, v)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        context, weights = _Attention.apply(on, *distinct(q, keys, memory, mask, v))
    else:
        run = _kernels(on).forward if is_direct((q, keys, memory)) else torch.ops.fastseq.attention_forward.default
        context, weights = run(q, keys, memory, mask, v, need_weights)
    return context, weights if need_weights else None


def _outputs(
    q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None, v: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    lead = q.shape[:2]
    return q.new_empty((*lead, memory.shape[2])), q.new_empty((*lead, keys.shape[1]) if save else 0)


def _gradients(
    d_context: Tensor | None, d_weights: Tensor | None, q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None,
    v: Tensor | None, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_keys, d_memory = (t.new_empty(t.shape) for t in (q, keys, memory))
    return d_q, d_keys, d_memory, q.new_empty(0 if v is None else v.shape)


def _inputs(
    q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None, v: Tensor | None
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The tensors whose addresses the kernel is given, contiguous, and its first arguments."""
    dense = [None if t is None else t.contiguous() for t in (q, keys, memory, mask, v)]
    (rows, steps, units), (batch, source, features) = q.shape, memory.shape
    sizes = (batch, rows * steps // max(batch, 1), source, units, features)
    return dense, (q.dtype is torch.bfloat16, sizes, *map(address, dense))


def _forward(
    q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None, v: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    assert _native.C is not None
    kept, arguments = _inputs(q, keys, memory, mask, v)
    context, weights = _outputs(q, keys, memory, mask, v, save)
    _native.C.attention_forward(
        *arguments, context.data_ptr(), weights.data_ptr() if save else 0, torch.get_num_threads()
    )
    del kept  # only now
    return context, weights


def _backward(
    d_context: Tensor | None, d_weights: Tensor | None, q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None,
    v: Tensor | None, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert _native.C is not None
    kept, arguments = _inputs(q, keys, memory, mask, v)
    d_context, d_weights = (None if d is None else d.contiguous() for d in (d_context, d_weights))
    results = _gradients(d_context, d_weights, q, keys, memory, mask, v, weights)
    _native.C.attention_backward(
        *arguments, weights.data_ptr(), address(d_context), address(d_weights), *(d.data_ptr() for d in results),
        torch.get_num_threads(),
    )  # fmt: skip
    del kept
    return results


_NATIVE = Kernels(_forward, _backward)


def _kernels(on: str) -> Kernels:
    return _NATIVE if on == "cpu" else gpu_kernels(on, "attention")


_LIBRARY.impl("attention_forward", _forward, "CPU")
_LIBRARY.impl("attention_backward", _backward, "CPU")
_LIBRARY.impl("attention_forward", torch.no_grad()(lambda *args: _kernels("triton").forward(*args)), "CUDA")
_LIBRARY.impl("attention_backward", torch.no_grad()(lambda *args: _kernels("triton").backward(*args)), "CUDA")
torch.library.register_fake("fastseq::attention_forward", _outputs, lib=_LIBRARY)
torch.library.register_fake("fastseq::attention_backward", _gradients, lib=_LIBRARY)
torch.library.register_autograd("fastseq::attention_forward", not_recorded, lib=_LIBRARY)


class _Attention(torch.autograd.Function):
    """Weights are always a result: backward needs them."""

    @staticmethod
    def forward(
        ctx: Any, on: str, q: Tensor, keys: Tensor, memory: Tensor, mask: Tensor | None, v: Tensor | None
    ) -> Any:
        run = _kernels(on).forward if is_direct((q, keys, memory)) else torch.ops.fastseq.attention_forward.default
        context, weights = run(q, keys, memory, mask, v, True)
        ctx.save_for_backward(q, keys, memory, mask, v, weights)
        ctx.on = on
        ctx.set_materialize_grads(False)
        return context, weights

    @staticmethod
    def backward(ctx: Any, d_context: Tensor | None, d_weights: Tensor | None) -> Any:
        q, keys, memory, mask, v, weights = ctx.saved_tensors
        if d_context is None and d_weights is None:
            return (None,) * 6
        if needs_recording((d_context, d_weights)):
            d: Sequence[Any] = _recorded((q, keys, memory, v), mask, (d_context, d_weights))
        else:
            direct = is_direct((q, keys, memory))
            run = _kernels(ctx.on).backward if direct else torch.ops.fastseq.attention_backward.default
            d = run(d_context, d_weights, q, keys, memory, mask, v, weights)
        d_q, d_keys, d_memory, d_v = d
        return None, d_q, d_keys, d_memory, None, None if v is None else d_v


def _recorded(inputs: Sequence[Tensor | None], mask: Tensor | None, grads: Sequence[Tensor | None]) -> list[Any]:
    """The gradients of q, keys, memory, v by plain PyTorch, themselves differentiable."""

    def forward(q: Tensor, keys: Tensor, memory: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        call = AttentionCall(q, Keys(keys, memory, mask), AttentionParams(v=v), need_weights=True)
        return decoder_reference.attention(call)

    return through_reference(forward, inputs, grads)
