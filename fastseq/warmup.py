"""fastseq.warmup: what a first call costs, paid beforehand."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from .errors import InputError

__all__ = ["warmup"]


def warmup(
    module: nn.Module, *inputs: Any, method: str = "forward", backward: bool | None = None, **options: Any
) -> float:
    """Run `module(*inputs, **options)` once in each mode, so that no later call waits for kernels to be compiled.

    module: any nn.Module, on the device and in the dtype it will be used in.
    inputs, options: as its call takes them: tensors and trees of them, PackedSequence too. Kernels are compiled for
    dtypes, options and sizes of weights; B, T and S may differ later.
    method: the one to call instead, such as "loss" or "generate" of a `Seq2Seq`.
    backward: None: also in training mode with gradients, if a parameter requires them; False: without gradients only;
    True: of inputs that require gradients as well, and TypeError where no result has one.
    Returns the seconds that it took.

    Everything is left as it was: gradients, buffers, training mode, random states, and the inputs, which are copied.
    The module's own hooks do run. Raises InputError or TypeError for a wrong argument, and what the call itself raises.

    >>> fastseq.warmup(lstm, torch.zeros(50, 8, 40, device="cuda"))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"warmup takes an nn.Module, got {type(module).__name__}")
    if not callable(getattr(module, method, None)):
        raise InputError(f"method={method!r}: {type(module).__name__} has no such method")
    wanted = [p for p in module.parameters() if p.requires_grad]
    begin = time.perf_counter()
    with _as_it_was(module, (inputs, options)):
        _call(module, method, _copied((inputs, options)), training=False)
        if backward or (backward is None and wanted):
            copies = _copied((inputs, options))
            given = [t for t in _tensors(copies) if t.requires_grad]
            results = [t for t in _tensors(_call(module, method, copies, training=True)) if t.requires_grad]
            if results:
                seeds = [torch.ones_like(t) for t in results]
                torch.autograd.grad(results, [*wanted, *given], seeds, allow_unused=True)
            elif backward:
                raise TypeError(f"backward=True, but no result of {method} has a gradient; pass backward=None")
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def _call(module: nn.Module, method: str, given: Any, training: bool) -> Any:
    for part in module.modules():
        part.training = training
    inputs, options = given
    with torch.set_grad_enabled(training):
        return (module if method == "forward" else getattr(module, method))(*inputs, **options)


@contextmanager
def _as_it_was(module: nn.Module, given: Any) -> Iterator[None]:
    """Within the block copies stand for the buffers; after it come they, the modes and the random states again."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    with torch.random.fork_rng(_gpus([*module.parameters(), *module.buffers(), *_tensors(given)])):
        try:
            for part, kept in buffers:
                part._buffers.update({name: None if t is None else t.detach().clone() for name, t in kept.items()})
            yield
        finally:
            for part, kept in buffers:
                part._buffers.clear()
                part._buffers.update(kept)
            for part, mode in modes:
                part.training = mode


def _gpus(tensors: Sequence[Tensor]) -> list[torch.device]:
    return sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)


def _copied(tree: Any) -> Any:
    def copy(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            return PackedSequence(copy(leaf.data), *leaf[1:])
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return tree_map(copy, tree)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(tree))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
