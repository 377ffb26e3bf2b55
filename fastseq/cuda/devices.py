"""What the plans must know of a GPU: of this machine's, and of those that are only planned for."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from . import native

__all__ = ["A100", "B200", "DEVICES", "EMULATED", "H200", "DeviceSpec", "of"]


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU. Rates marked * are assumed until benchmarks/results has them measured."""

    name: str
    arch: int  # 90: sm_90
    units: int  # SMs
    shared: int  # bytes of shared memory that one block may have
    clusters: tuple[tuple[int, int], ...] = ()  # (blocks of a cluster, such clusters at once); none below sm_90
    tensor_flops: float = 6.0e6  # a us, an SM, 16-bit mma.sync; half of it for TF32
    vector_flops: float = 0.45e6  # a us, an SM, fp32
    shared_bytes: float = 225e3  # a us, an SM: 128 a clock
    remote_bytes: float = 25e3  # * a us, an SM: writes into another block's shared memory
    l2_bytes: float = 5.5e6  # * a us, the GPU
    memory_bytes: float = 4.8e6  # * a us, the GPU
    memory: int = 141 * 10**9  # bytes
    cluster_barrier: float = 0.4  # * us
    grid_barrier: float = 1.2  # * us
    step: float = (
        0.25  # * us of a step that no rate explains: latencies of the product, the cell and two block barriers
    )


# Clusters: a GPC of an H100 or H200 has at most 18 SMs and some have fewer than 16, so of 16 blocks at most 7 fit.
# Assumed: of the GPU at hand `of` asks the driver.
H200 = DeviceSpec("H200", 90, 132, 227 * 1024, ((2, 66), (4, 32), (8, 16), (16, 7)))
B200 = DeviceSpec(
    "B200", 100, 148, 227 * 1024, ((2, 74), (4, 36), (8, 16), (16, 8)), tensor_flops=7.0e6, memory_bytes=8.0e6,
    memory=180 * 10**9,
)  # fmt: skip
A100 = DeviceSpec(
    "A100", 80, 108, 163 * 1024, tensor_flops=2.9e6, vector_flops=0.18e6, shared_bytes=180e3, l2_bytes=3.5e6,
    memory_bytes=2.0e6, memory=80 * 10**9,
)  # fmt: skip
RTX_4090 = DeviceSpec(
    "RTX 4090", 89, 128, 99 * 1024, tensor_flops=1.3e6, shared_bytes=320e3, l2_bytes=5.0e6, memory_bytes=1.0e6,
    memory=24 * 10**9,
)  # fmt: skip
DEVICES = (A100, RTX_4090, H200, B200)
EMULATED = H200  # what emulated kernels are planned for; tests choose others


@lru_cache(maxsize=64)
def _found(index: int) -> DeviceSpec:
    found = torch.cuda.get_device_properties(index)
    arch, shared = 10 * found.major + found.minor, getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    like = max((d for d in DEVICES if d.arch <= arch), key=lambda d: d.arch)  # rates of the nearest known one
    sizes = (2, 4, 8, 16) if like.clusters else ()
    clusters = tuple((n, count) for n in sizes if (count := _clusters(index, n, shared)))
    return DeviceSpec(
        found.name, arch, found.multi_processor_count, shared, clusters, like.tensor_flops, like.vector_flops,
        like.shared_bytes, like.remote_bytes, like.l2_bytes, like.memory_bytes, found.total_memory,
    )  # fmt: skip


def _clusters(index: int, blocks: int, shared: int) -> int:
    """How many clusters of so many blocks fit, of any kernel: each block has all shared memory of an SM."""
    assert native.C is not None
    hidden = 32 * blocks
    try:
        with torch.cuda.device(index):
            shape = (1, blocks, 32, 16, 1, 0)
            return native.C.rnn_clusters(index, native.KINDS["brain_half"], 0, True, shape, hidden, shared)
    except RuntimeError:  # more blocks, or more shared memory of each, than this GPU has
        return 0


def of(device: torch.device) -> DeviceSpec:
    """The GPU that this is; of the CPU, where kernels are emulated, the one that they are planned for."""
    if device.type == "cpu":
        return EMULATED
    return _found(device.index if device.index is not None else torch.cuda.current_device())
