"""Guard bands around the memory of tensors: what is written there fails the test, what is read there is NaN."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["OutOfBounds", "guard_bands"]

ALIGNED = 256  # as PyTorch's memory of GPUs
# Of every float type a NaN that no operation gives, and no number that a kernel would write.
BAND = b"\xf7\xff" * 2048
MAKERS = [*((torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like")), (Tensor, "new_empty")]

_active: list[Any] = []  # every block of the test, as (memory, its first byte of the tensor, bytes, the tensor's name)
_nested = 0


class OutOfBounds(AssertionError):
    pass


def _between_bands(t: Tensor) -> Tensor:
    """`t` again, in memory of its own."""
    plain = type(t) is Tensor and t.device.type == "cpu" and t.layout is torch.strided
    if (
        not plain
        or torch.compiler.is_compiling()
        or not t.numel()
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    ):
        return t
    size = t.untyped_storage().nbytes()
    memory = bytearray(len(BAND) + ALIGNED + size + len(BAND))
    start = len(BAND) + -(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + len(BAND)) % ALIGNED
    memory[:start] = (BAND + BAND)[:start]
    memory[start + size :] = (BAND + BAND)[: len(memory) - start - size]
    with torch.no_grad():
        inner = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
        guarded = t.detach().set_(inner.untyped_storage(), 0, t.shape, t.stride()).copy_(t)
    _active.append((memory, start, size, f"{t.dtype} tensor of shape {tuple(t.shape)}"))
    return guarded.requires_grad_(t.requires_grad)


def _guarding(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **options: Any) -> Tensor:
        return _between_bands(make(*args, **options))

    return made


def _check() -> None:
    for memory, start, size, name in _active:
        for side, at, band in (("before", 0, memory[:start]), ("behind", start + size, memory[start + size :])):
            if band != (BAND + BAND)[: len(band)]:
                wrong = [i for i, byte in enumerate(band) if byte != (BAND + BAND)[i]]
                first = at + wrong[0] - start
                raise OutOfBounds(
                    f"{len(wrong)} bytes {side} a {name} were written, from byte {first} of its {size} on"
                )


@contextmanager
def guard_bands() -> Iterator[None]:
    """What torch.empty and its like give on a CPU lies between guard bands, which are looked at in the end."""
    global _nested
    if _nested:  # its outermost one looks
        yield
        return
    _nested = 1
    try:
        with pytest.MonkeyPatch.context() as patch:
            for place, name in MAKERS:
                patch.setattr(place, name, _guarding(getattr(place, name)))
            yield
        _check()
    finally:
        _active.clear()
        _nested = 0
