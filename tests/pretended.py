"""Tensors of the CPU, or without values, that say they are on a GPU."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastseq import _triton, dispatch, engine

__all__ = ["Gpu", "InBackwardToo", "reachable"]

_DEVICE, _IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__  # type: ignore[attr-defined]

_UNFILLED = (Tensor.new_empty, torch.empty, torch.empty_like)
_OF_NUMBERS = (torch.tensor, torch.as_tensor)


def reachable(patch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the library can tell; its own operators are called, whatever watches PyTorch's."""
    patch.setattr(_triton, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    patch.setattr(engine, "_plans", {})
    patch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda self: None)  # cuDNN would
    for operator in dispatch.OPERATORS:  # what they import must be there before it is replaced
        dispatch.load("triton", operator)
    for name, module in [*sys.modules.items()]:
        if name.startswith("fastseq.") and hasattr(module, "is_direct"):
            patch.setattr(module, "is_direct", lambda tensors: True)


class InBackwardToo(TorchFunctionMode):
    """A mode that sees what a backward pass calls too; PyTorch leaves its own at the pass's door."""

    def __init__(self) -> None:
        super().__init__()
        self._before: list[Any] = []  # a mode may be entered again within itself

    def __enter__(self) -> Any:
        self._before.append(torch.autograd.has_torch_function)
        torch.autograd.has_torch_function = lambda tensors: False  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.autograd.has_torch_function = self._before.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not Tensor.backward:
            return function(*args, **kwargs)
        with self:  # for it asks whether there are modes by itself
            return torch.autograd.backward(args[0], kwargs.pop("gradient"), **kwargs)


class Gpu(InBackwardToo):
    """Within the block tensors of the device `real`, "meta" or "cpu", say that they are on a GPU, and are made there
    where one is asked for; what nobody fills is 0, no NaN.
    """

    def __init__(self, index: int = 0, real: str = "meta") -> None:
        super().__init__()
        self.device, self.real = torch.device("cuda", index), torch.device(real)
        self.sent: list[str] = []  # what made tensors there of numbers on the host
        self._sizes: list[Tensor] = []  # of packed batches: these stay on the CPU

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == _DEVICE:
            return self.device if self._has(args[0]) else function(*args)
        if function == _IS_CUDA:
            return self._has(args[0])
        kwargs = {name: self._where(value) for name, value in (kwargs or {}).items()}
        if function in _OF_NUMBERS and self.real in kwargs.values():
            self.sent.append(function.__name__)
        found = super().__torch_function__(function, types, [self._where(value) for value in args], kwargs)
        if function is torch._VF._pack_padded_sequence:  # type: ignore[attr-defined]
            self._sizes.append(found[1])
        return found.zero_() if function in _UNFILLED else found

    def _has(self, t: Tensor) -> bool:
        return _DEVICE(t) == self.real and not any(t is other for other in self._sizes)

    def _where(self, value: Any) -> Any:
        return self.real if isinstance(value, torch.device | str) and str(value).startswith("cuda") else value
