"""The CUDA extension, loaded once. `C` is the module, or None with the `reason`; tests put emulated kernels there."""

import ctypes
import importlib
import math
import os
from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

__all__ = [
    "KINDS",
    "address",
    "emulates",
    "kind_of",
    "launch",
    "obstacle_on",
    "patience",
    "stop_flag",
    "unavailable",
    "where",
]

C: ModuleType | None
reason: str | None

try:
    C = importlib.import_module("fastseq._cuda")

    reason = None
except ImportError as error:
    C = None
    reason = f"the CUDA extension is not built ({error}); reinstall with nvcc of CUDA 12.1 or newer and FASTSEQ_CUDA=1"

KINDS = {"full32": 0, "tensor32": 1, "brain_half": 2, "half": 3}  # as in csrc/cuda/rnn.h
_DTYPES = {torch.float32: "full32", torch.bfloat16: "brain_half", torch.float16: "half"}


def emulates() -> bool:
    """Whether the kernels run on CPU tensors, emulated: slow, for tests."""
    return hasattr(C, "seed_schedule")


def unavailable() -> str | None:
    """Why the kernels cannot run here; None: they can."""
    if C is None:
        return reason
    if emulates():
        return None
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs"
    return _no_driver() or (None if torch.cuda.is_available() else "PyTorch reaches no GPU here")


@lru_cache(maxsize=1)
def _no_driver() -> str | None:
    assert C is not None
    return C.obstacle() or None


def obstacle_on(name: str, t: torch.Tensor) -> str | None:
    """Why the kernels cannot read `t`, called `name` in the message."""
    kind = "cpu" if emulates() else "cuda"
    if t.device.type != kind:
        return f"{name} is on {t.device}; these kernels run on " + (
            "an NVIDIA GPU" if kind == "cuda" else "the CPU, emulated"
        )
    if t.dtype not in _DTYPES:
        return f"{name} is {t.dtype}; these kernels take float32, bfloat16 and float16"
    if kind == "cuda":
        found = torch.cuda.get_device_properties(t.device)
        if found.major < 8:
            return f"{found.name} is sm_{found.major}{found.minor}; these kernels need sm_80 or newer"
    return None


def kind_of(dtype: torch.dtype, tf32: bool) -> str:
    """As what kind of numbers `dtype` is multiplied; tf32: whether PyTorch's flag for the operator allows it."""
    return "tensor32" if tf32 and dtype is torch.float32 else _DTYPES[dtype]


def where(x: torch.Tensor) -> tuple[int, int]:
    """(GPU, stream) of the kernels on x's device now."""
    if x.device.type == "cpu":
        return 0, 0
    index = x.device.index if x.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def launch(function: str, x: torch.Tensor, *args: Any) -> None:
    """One of the module's functions, whose last argument says where: on x's device, in its current stream.

    The device is also PyTorch's meanwhile, since the module's own CUDA runtime sets what both take for the current one.
    """
    assert C is not None
    with nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device):
        getattr(C, function)(*args, where(x))


_flags: dict[torch.device, torch.Tensor] = {}


def stop_flag(x: torch.Tensor) -> torch.Tensor:
    """What a kernel sets that waited too long: in host memory that the GPU reaches, so that it is read without waiting.

    Raises RuntimeError if an earlier kernel has.
    """
    flag = _flags.get(x.device)
    if flag is None:  # an ordinary tensor, whatever modes the first call is made in; of two threads' one is kept
        with torch.inference_mode(False):
            made = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=x.device.type == "cuda")
        flag = _flags.setdefault(x.device, made)
    word = ctypes.c_int32.from_address(flag.data_ptr())
    if word.value:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)  # blocks that came late leave by it too
        word.value = 0
        raise RuntimeError(
            f"fastseq: a kernel on {x.device} gave up after {patience() / 1e9:g} s of waiting for its other blocks; "
            "results since the last check are wrong. Another program may hold the GPU; under a debugger set "
            "FASTSEQ_PATIENCE=0"
        )
    return flag


@lru_cache(maxsize=1)
def patience() -> int:
    """ns that a block waits for another; 0: for ever."""
    given = os.environ.get("FASTSEQ_PATIENCE", "20")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e8:  # NaN neither; kernels multiply it within 64 bits
        raise ValueError(f"FASTSEQ_PATIENCE={given!r}; expected seconds, 0 for no limit")
    return math.ceil(seconds * 1e9)  # the shortest is not 0


def address(t: Any) -> int:
    return 0 if t is None else t.data_ptr()
