"""What the kernels must know of a GPU, for real ones and for those that are only compiled for."""

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["DEVICES", "INTERPRETER", "Device", "of"]


@dataclass(frozen=True)
class Device:
    """A GPU as a target. Compute units are NVIDIA's SMs or AMD's CUs."""

    name: str
    backend: str  # "cuda" | "hip" | "interpreter"
    arch: int | str  # 90, "gfx942"
    shared: int  # bytes of shared memory (LDS) that one program may have
    units: int  # compute units
    warp: int = 32

    @property
    def cooperative(self) -> bool:
        """Whether the programs of a grid of one a unit may wait for each other within a launch."""
        return self.backend == "cuda" or self.units == 1


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (maximum a block, 1 KB
# below that of an SM from sm_80 on); CDNA 3 ISA: 64 KB of LDS. Units are those of the largest part sold.
DEVICES = (
    Device("A100", "cuda", 80, 163 * 1024, 108),
    Device("RTX 3090", "cuda", 86, 99 * 1024, 82),
    Device("RTX 4090", "cuda", 89, 99 * 1024, 128),
    Device("H200", "cuda", 90, 227 * 1024, 132),
    Device("B200", "cuda", 100, 227 * 1024, 148),
    Device("RTX 5090", "cuda", 120, 99 * 1024, 170),
    Device("MI300X", "hip", "gfx942", 64 * 1024, 304, 64),
)
INTERPRETER = Device("interpreter", "interpreter", 0, 1 << 30, 1)  # runs one program after another


@lru_cache(maxsize=64)
def of(index: int) -> Device:
    """The GPU `index` of this machine."""
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        return Device(found.name, "hip", arch, 64 * 1024, found.multi_processor_count, found.warp_size)
    arch = 10 * found.major + found.minor
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Device(found.name, "cuda", arch, shared, found.multi_processor_count)
