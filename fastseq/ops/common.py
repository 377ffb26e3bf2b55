"""What the operators share: addresses, whose kernels run, and differentiable gradients."""

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..errors import InputError

__all__ = [
    "PLAIN", "Kernels", "address", "distinct", "gpu_kernels", "is_direct", "needs_recording", "not_recorded",
    "runs_once", "saved_by", "saves_unseen", "schema", "through_reference",
]  # fmt: skip

PLAIN = {Tensor, torch.nn.Parameter}


class Kernels(NamedTuple):
    """Whose kernels run an operator: both take the arguments of its schema, and give None where that has empty tensors.

    Called directly an operator is told which, `on` being a backend's name. Through its schema, as by torch.compile, the
    tensors' device decides, the CPU's or Triton's, unless the schema's `on` names another.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


_GPU = {"triton": "fastseq.kernels", "cuda": "fastseq.cuda"}


@lru_cache(maxsize=16)
def gpu_kernels(on: str, module: str) -> Kernels:
    """Those of this backend's <module>, which may import Triton."""
    found = importlib.import_module(f"{_GPU[on]}.{module}")
    return Kernels(found.forward, found.backward)


def schema(operator: Callable[..., Any], on: str) -> Callable[..., Any]:
    """An operator of torch.ops.fastseq for kernels of `on`."""
    return partial(operator, on=on) if on == "cuda" else operator


def is_direct(tensors: Sequence[Tensor]) -> bool:
    """Whether these tensors' addresses hold their values: nothing compiles, traces, fakes or wraps them."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and PLAIN.issuperset(map(type, tensors))
    )


def distinct(*tensors: Any) -> Sequence[Any]:
    """The same values; under torch.compile as views, since it gives a Function no tensor twice: (z, z) as h0 and c0."""
    if not torch.compiler.is_compiling():
        return tensors
    return [None if t is None else t.view_as(t) for t in tensors]


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def saves_unseen() -> bool:
    """Whether a Function alone holds what it saves now: no hooks pack it, who might keep and read it later."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # absent before torch 2.8
    return top is not None and top(True) is None


def saved_by(ctx: Any) -> Sequence[Tensor]:
    """What a Function saved. Raises RuntimeError, as PyTorch, if some of it was changed in place since."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{error} fastseq's backward reads inputs, weights and, as cuDNN's, the output itself: change none of them "
            "in place before it; write out = out + x, not out += x, and change a clone() of out"
        ) from None


def runs_once() -> bool:
    """Whether the backward pass that now runs frees its graph (no retain_graph), so that none can follow."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def not_recorded(ctx: Any, *grads: Any) -> NoReturn:
    """The gradient of an operator called by itself, as in an exported program: otherwise None, and a warning."""
    raise InputError(
        "a program of torch.export holds fastseq's operators without their gradients and cannot be trained; train the "
        "module and export it again, or export it with backend='reference'"
    )


def needs_recording(grads: Sequence[Tensor | None]) -> bool:
    """Whether backward over `grads` must be of PyTorch's operators: create_graph, torch.func, is_grads_batched."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def through_reference(
    forward: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Any]:
    """Gradients of forward's `inputs`, themselves differentiable: what create_graph asks for, recomputed."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _pulled_back(forward, inputs, grads)
    with torch.enable_grad():
        # Views, for one tensor may be another's source, or come twice: gradients must stop at this layer's own inputs.
        views = [None if t is None else t.view_as(t) for t in inputs]
        results = forward(*views)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r is not None and g is not None]
        if not pairs:
            return [None] * len(views)
        wanted = [t for t in views if t is not None and t.requires_grad]
        outputs, grad_outputs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in views]


def _pulled_back(
    forward: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Any]:
    """The same within a transform of torch.func, where requires_grad of what was saved may be of a level long gone."""
    given = [t for t in inputs if t is not None]

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        found = forward(*[None if t is None else next(left) for t in inputs])
        return tuple(r for r, g in zip(found, grads, strict=True) if r is not None and g is not None)

    pull: Any = torch.func.vjp(results, *given)[1]
    found = iter(pull(tuple(g for g in grads if g is not None)))
    return [None if t is None else next(found) for t in inputs]
