"""The CPU, by a name that measurements are kept under."""

import platform
from functools import lru_cache
from pathlib import Path

from . import _native

__all__ = ["cpu_name", "model"]


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Its model and the instruction set that the kernels were given: of another one they are other kernels."""
    return f"{model()}, {'no kernels' if _native.C is None else _native.C.isa()}"


def model() -> str:
    """As the kernel tells it, with family and model number, since virtual machines hide names."""
    info = Path("/proc/cpuinfo")
    known = dict[str, str]()
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    name = known.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{word} {known[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in known]
    return f"{name} ({', '.join(numbers)})" if numbers else name
