"""The products of linear layers, and `torch.ops.fastseq.linear` on them: sums in fp32, results in the operands' dtype.

Letters: tokens [N, T] or [M], K input features, O output features. The products take fp32 or bf16, on a GPU fp16 too,
all of one dtype, dense in the last dimension and of any strides before it: slices of larger buffers are read and
written in place. On the CPU they are the native module's, elsewhere PyTorch's own. Their callers check; what is
asserted here would be a fault of fastseq.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .common import address, is_direct, needs_recording, not_recorded, through_reference

__all__ = ["input_gradient", "linear", "product", "weight_gradient"]

_LIBRARY = torch.library.Library("fastseq", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor w, Tensor? b) -> Tensor")
# needs: x, w, b. Those not needed are empty.
_LIBRARY.define("linear_backward(Tensor dy, Tensor x, Tensor w, bool[] needs) -> (Tensor dx, Tensor dw, Tensor db)")

_DTYPES = (torch.float32, torch.bfloat16)


def product(
    x: Tensor,  # [N, T, K] or [M, K]
    w: Tensor,  # [O, K]
    b: Tensor | None = None,  # [O]
    out: Tensor | None = None,  # [N, T, O] or [M, O]
    add: bool = False,
) -> Tensor:
    """out[n, t, o] = sum_k x[n, t, k] w[o, k] (+ b[o]); with `add`, plus what `out` holds."""
    assert x.shape[-1] == w.shape[1]
    assert b is None or (b.shape == w.shape[:1] and b.dtype == w.dtype and _is_dense(b))
    return _multiply("product", x, w, b, w.shape[0], out, add)


def input_gradient(
    dy: Tensor,  # [N, T, O] or [M, O]
    w: Tensor,  # [O, K]
    out: Tensor | None = None,  # [N, T, K] or [M, K]
    add: bool = False,
) -> Tensor:
    """out[n, t, k] = sum_o dy[n, t, o] w[o, k]; with `add`, plus what `out` holds."""
    assert dy.shape[-1] == w.shape[0]
    return _multiply("input_gradient", dy, w, None, w.shape[1], out, add)


def _multiply(name: str, x: Tensor, w: Tensor, b: Tensor | None, columns: int, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        assert not add
        out = x.new_empty((*x.shape[:-1], columns))
    assert out.shape == (*x.shape[:-1], columns)
    assert x.dtype == w.dtype == out.dtype
    if not _is_native(x):
        made = x @ (w.mT if name == "product" else w)
        made = made if b is None else made + b
        return out.add_(made) if add else out.copy_(made)
    getattr(_native.C, name)(
        _is_bf16(x), math.prod(x.shape[:-1]), x.shape[-1], columns, _tokens(x), _tokens(out), *_matrix(w), address(b),
        add, torch.get_num_threads(),
    )  # fmt: skip
    return out


def weight_gradient(
    dy: Tensor,  # [N, T, O] or [M, O]
    x: Tensor,  # [N, T, K] or [M, K]
    dw: Tensor | None,  # [O, K]; None: not wanted
    db: Tensor | None = None,  # [O]
) -> None:
    """Fills dw[o, k] = sum_nt dy[n, t, o] x[n, t, k] and db[o] = sum_nt dy[n, t, o]: fp32 sums, rounded once."""
    assert dy.shape[:-1] == x.shape[:-1]
    assert dw is None or (dw.shape == (dy.shape[-1], x.shape[-1]) and dw.dtype == x.dtype)
    assert db is None or (db.shape == dy.shape[-1:] and db.dtype == x.dtype and _is_dense(db))
    assert dy.dtype == x.dtype
    if not _is_native(x):
        if dw is not None:
            dw.copy_(dy.flatten(0, -2).mT @ x.flatten(0, -2))
        if db is not None:
            db.copy_(dy.flatten(0, -2).sum(0, dtype=torch.float32))
        return
    assert _native.C is not None
    _native.C.weight_gradient(
        _is_bf16(x), math.prod(x.shape[:-1]), dy.shape[-1], x.shape[-1], _tokens(dy), _tokens(x),
        *((0, 0) if dw is None else _matrix(dw)), address(db), torch.get_num_threads(),
    )  # fmt: skip


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _DTYPES and _native.C is not None


def _is_bf16(x: Tensor) -> bool:
    assert x.dtype in _DTYPES
    return x.dtype is torch.bfloat16


def _is_dense(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] <= 1


def _tokens(x: Tensor) -> tuple[int, int, int, int]:
    """Address, size of the inner one of two leading dimensions, their strides."""
    assert x.dim() in (2, 3)
    assert _is_dense(x)
    if x.dim() == 2:
        return x.data_ptr(), x.shape[0], 0, x.stride(0)
    return x.data_ptr(), x.shape[1], x.stride(0), x.stride(1)


def _matrix(w: Tensor) -> tuple[int, int]:
    """Address and elements between two rows."""
    assert _is_dense(w)
    return w.data_ptr(), w.stride(0)


def _dense(t: Tensor) -> Tensor:
    return t if _is_dense(t) else t.contiguous()


def _forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return product(_dense(x), _dense(w), None if b is None else _dense(b))


def _backward(dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dy = _dense(dy)
    dx, dw, db = _gradients(dy, x, w, needs)
    if needs[0]:
        input_gradient(dy, _dense(w), dx)
    if needs[1] or needs[2]:
        weight_gradient(dy, _dense(x), dw if needs[1] else None, db if needs[2] else None)
    return dx, dw, db


def _gradients(dy: Tensor, x: Tensor, w: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((*x.shape,), (*w.shape,), (w.shape[0],))
    dx, dw, db = (x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
    return dx, dw, db


_LIBRARY.impl("linear", _forward, "CPU")
_LIBRARY.impl("linear_backward", _backward, "CPU")
torch.library.register_fake("fastseq::linear", lambda x, w, b: x.new_empty((*x.shape[:-1], w.shape[0])), lib=_LIBRARY)
torch.library.register_fake("fastseq::linear_backward", _gradients, lib=_LIBRARY)
torch.library.register_autograd("fastseq::linear", not_recorded, lib=_LIBRARY)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
        ctx.save_for_backward(x, w, b)
        run = _forward if is_direct((x, w)) else torch.ops.fastseq.linear.default
        return run(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, b = ctx.saved_tensors
        if needs_recording((dy,)):
            return tuple(through_reference(lambda *inputs: (torch.nn.functional.linear(*inputs),), (x, w, b), (dy,)))
        needs = list(ctx.needs_input_grad)
        run = _backward if is_direct((dy, x, w)) else torch.ops.fastseq.linear_backward.default
        return tuple(d if need else None for d, need in zip(run(dy, x, w, needs), needs, strict=True))


def linear(
    x: Tensor,  # [N, T, K] or [M, K]
    w: Tensor,  # [O, K]
    b: Tensor | None = None,  # [O]
) -> Tensor:
    """x w^T + b, differentiable: on the products above, or PyTorch's own where they cannot serve.

    That is other dtypes, devices and numbers of dimensions, torch.func, forward-mode gradients and torch.jit.trace.
    """
    if not _serves(x, w, b):
        return torch.nn.functional.linear(x, w, b)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (b is not None and b.requires_grad)):
        return _Linear.apply(x, w, b)
    return (_forward if is_direct((x, w)) else torch.ops.fastseq.linear.default)(x, w, b)


def _serves(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    return (
        _native.C is not None
        and x.dim() in (2, 3)
        and x.dtype in _DTYPES
        and x.device.type == "cpu"
        and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in (w, b))
        and torch.autograd.forward_ad._current_level < 0
        and (
            torch.compiler.is_compiling()
            or (torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_tracing_state() is None)
        )
    )
