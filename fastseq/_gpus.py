"""The GPUs that PyTorch reaches, or why it reaches none."""

import importlib.metadata
import re
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["gpu_name", "no_gpu", "software", "told"]

DRIVER = Path("/proc/driver/nvidia/version")
GIB, KIB = 1 << 30, 1 << 10


@lru_cache(maxsize=64)
def gpu_name(index: int | None) -> str:
    """What PyTorch calls this GPU, None being the current one; empty where it reaches none."""
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""


def no_gpu() -> str | None:
    """Why PyTorch reaches no GPU here; None: it does."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this PyTorch ({torch.__version__}) is built for the CPU alone; https://pytorch.org/get-started has others"
        )
    if not torch.cuda.is_available():
        seen = f"driver {driver()}" if driver() is not None else "no NVIDIA driver is loaded"
        return f"PyTorch ({torch.__version__}) reaches no GPU: torch.cuda.is_available() is False; {seen}"
    return None


def told(index: int) -> str:
    """One GPU in a line: name, architecture, memory, shared memory of a block, and multiprocessors."""
    found = torch.cuda.get_device_properties(index)
    arch = getattr(found, "gcnArchName", None) if torch.version.hip else f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0)
    parts = [found.name, str(arch), f"{found.total_memory / GIB:.0f} GiB"]
    parts += [f"{shared // KIB} KiB of shared memory a block"] if shared else []
    return ", ".join([*parts, f"{found.multi_processor_count} multiprocessors"])


def software() -> str:
    """Versions of what runs kernels."""
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"driver {driver() or 'unknown'}, {runtime}, Triton {triton_version()}"


def driver() -> str | None:
    """The NVIDIA kernel driver's version; None where there is none, or it does not say."""
    if not DRIVER.exists():
        return None
    version = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", DRIVER.read_text())
    return None if version is None else version[1]


def triton_version() -> str:
    """Without importing it."""
    names = ("triton", "pytorch-triton", "pytorch-triton-rocm")
    found = (d.version for name in names for d in importlib.metadata.distributions(name=name))
    return next(found, "absent")
