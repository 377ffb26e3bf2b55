"""The one way to start a kernel. A host function makes a `Launch`, a plain value; `run` starts it, interprets it, or,
while `recording`, only notes it: then everything but the kernel's own work happens as it would on that device, on fake
tensors too, and what was noted can be compiled ahead of time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import gt
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastseq.errors import InputError
from fastseq.ops.rnn_gpu import tf32_flag

from . import devices
from .devices import Device

__all__ = [
    "GRID",
    "INTERPRETED",
    "Launch",
    "aligned",
    "cdiv",
    "device_of",
    "placed",
    "precision",
    "recording",
    "run",
    "tf32_allowed",
]

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when the kernels were decorated

GRID = (2**31 - 1, 65535, 65535)  # programs along each axis: CUDA's limits


class Launch(NamedTuple):
    """A kernel and all that it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # tensors, numbers, None, tuples of these, in the order of the kernel's parameters
    constants: dict[str, Any]  # its constexpr parameters
    warps: int = 4
    stages: int = 2
    cooperative: bool = False  # the whole grid is resident and has a barrier
    unshared: bool = False  # its programs hardly ever share a compute unit: each may have all of its registers

    def options(self, device: Device) -> dict[str, Any]:
        """What Triton is told beside the arguments."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        if self.unshared and device.backend == "cuda":  # else ptxas spills a few, for programs that never come
            options["maxnreg"] = min(255, 65536 // (device.warp * self.warps))
        return options


_recorded: ContextVar[tuple[Device, list[Launch]] | None] = ContextVar("fastseq_launches", default=None)


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Within the block nothing is started; the list has what would have been on `device`."""
    launches: list[Launch] = []
    token = _recorded.set((device, launches))
    try:
        yield launches
    finally:
        _recorded.reset(token)


def device_of(x: Tensor) -> Device:
    """What a kernel on this tensor runs on."""
    recorded = _recorded.get()
    if recorded is not None:
        return recorded[0]
    if INTERPRETED:
        return devices.INTERPRETER
    return devices.of(x.device.index if x.device.index is not None else torch.cuda.current_device())


def run(x: Tensor, launch: Launch) -> None:
    """Start `launch` on the device of `x`, in its current stream. InputError where its grid is larger than GRID."""
    if any(map(gt, launch.grid, GRID)):
        name, asked = launch.kernel.__name__, tuple(launch.grid)
        raise InputError(f"{name} needs {asked} programs, the limit is {GRID}; use fewer rows or shorter sequences")
    recorded = _recorded.get()
    if recorded is not None:
        recorded[1].append(launch)
        return
    if INTERPRETED:
        launch.kernel[launch.grid](*launch.args, **launch.constants)
        return
    options = launch.options(device_of(x))
    with torch.cuda.device(x.device):
        launch.kernel[launch.grid](*launch.args, **launch.constants, **options)


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """PRECISION of `blocks.dot`. tf32: whether PyTorch's flag for this operator allows it."""
    if INTERPRETED and _recorded.get() is None:  # whose own products of bf16 are silently wrong
        return "upcast"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that hold n: triton.cdiv, which takes 3 us."""
    return -(-n // size)


def tf32_allowed(x: Tensor, operator: str) -> bool:
    """Whether x's device has TF32 and PyTorch allows it to this operator, "rnn" or "matmul"."""
    if device_of(x).backend != "cuda":
        return False
    return tf32_flag(operator)


def aligned(t: Tensor) -> Tensor:
    """`t`, contiguous and at a multiple of 16 bytes: a kernel is compiled for such addresses, and only once."""
    return placed(t.contiguous())


def placed(t: Tensor) -> Tensor:
    """`t` in its own layout, at a multiple of 16 bytes."""
    if _recorded.get() is None and t.data_ptr() % 16:
        return t.clone()
    return t
