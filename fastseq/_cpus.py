"""The CPU, by a name that measurements are kept under."""

import platform
import subprocess
from functools import lru_cache
from pathlib import Path

from . import _native

__all__ = ["cpu_name", "model"]

NUMBERS = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}  # x86; Arm


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Its model and the instruction set that the kernels were given: of another one they are other kernels."""
    return f"{model()}, {'no kernels' if _native.C is None else _native.C.isa()}"


@lru_cache(maxsize=1)
def model() -> str:
    """As the kernel tells it, with the numbers that virtual machines do not hide."""
    info = Path("/proc/cpuinfo")
    known = dict[str, str]()
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    name = known.get("model name") or _apple() or platform.processor() or platform.machine()
    numbers = [f"{word} {known[key]}" for key, word in NUMBERS.items() if key in known]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _apple() -> str:
    """What macOS calls it; empty elsewhere."""
    if platform.system() != "Darwin":
        return ""
    done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    return done.stdout.strip()
