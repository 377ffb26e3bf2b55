"""Whether this machine can run the Triton kernels, asked without importing Triton."""

import importlib.util
import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["interprets", "obstacle_on", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the kernels cannot run here; None: they can."""
    if not _installed():
        return "triton is not installed; pip install triton"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "PyTorch reaches no GPU here (torch.cuda.is_available() is False)"
    return _no_compiler()


@lru_cache(maxsize=1)
def _no_compiler() -> str | None:
    """Why Triton cannot build what starts a kernel: it does so with a C compiler, where a kernel is first used."""
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton needs a C compiler at run time and found none; install gcc or clang, or set CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python's headers at run time (Python.h); install them, as by apt install python3-dev"
    return None


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # a hook forbids it; a stand-in without a spec
        return False


def obstacle_on(name: str, t: torch.Tensor) -> str | None:
    """Why the kernels cannot read `t`, called `name` in the message."""
    kind = "cpu" if interprets() else "cuda"
    if t.device.type != kind:
        return f"{name} is on {t.device}; these kernels run on " + (
            "a GPU" if kind == "cuda" else "the CPU, interpreted"
        )
    if t.dtype not in DTYPES:
        return f"{name} is {t.dtype}; these kernels take float32, bfloat16 and float16"
    return None
