"""GPUs that are not there: Triton's whole way to the driver, which is a stub (tests/native/driver_stub.c).

A process that was started with `environment` has it for libcuda.so.1; `install` then puts it in Triton's way.
"""

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from fastseq.kernels import devices
from fastseq.kernels.devices import DEVICES
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from fastseq import _triton

__all__ = ["FOLDER", "H200", "LOADED", "ROOT", "Launched", "Stub", "environment", "install"]

ROOT = Path(__file__).parent.parent
FOLDER = "FASTSEQ_STUB_DRIVER"  # in the environment: where the stub lies
H200 = next(device for device in DEVICES if device.arch == 90)
LOADED = (1, 1, 0, 0, 1024)  # handles of a module and a function, registers, spills, threads
_INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def environment(folder: Path, cache: str = "cache") -> dict[str, str]:
    """Of a process with the stub, which is compiled into `folder`. cache: Triton's, within it."""
    library = folder / "libcuda.so.1"
    if not library.exists():
        source = ROOT / "tests" / "native" / "driver_stub.c"
        compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
        subprocess.run([compiler, "-shared", "-fPIC", f"-I{_INCLUDE}", source, "-o", library], check=True)
        (folder / "libcuda.so").symlink_to(library.name)
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / cache), "PYTHONPATH": str(ROOT),
        FOLDER: str(folder),
    }  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """What the driver got of a launch."""

    kernel: str  # module.name
    launches: int
    asked: list[int]  # the grid
    grid: list[int]
    arguments: int
    lost: list[int]  # which of them did not arrive
    cooperative: bool
    waits: bool  # within its grid
    compiled: int  # the kernel so far
    device: int  # the current one
    stream: int


@dataclass
class Stub:
    """A machine of two H200s."""

    library: Any
    launched: list[Launched] = field(default_factory=list)
    told: Callable[[Launched], None] | None = None  # of each launch
    device: int = 0  # the current one
    streams: dict[int, int] = field(default_factory=lambda: {0: 0x5000, 1: 0x5001})  # the current ones
    load: Callable[[], tuple[int, ...]] = lambda: LOADED  # a kernel, onto the device
    kernels: set[JITFunction] = field(default_factory=set)  # those launched

    def number(self, name: str) -> Any:
        return ctypes.c_int.in_dll(self.library, f"stub_{name}")

    def forget(self) -> None:
        """Every kernel that was compiled and loaded, but for what is on the disk."""
        for kernel in self.kernels:
            kernel.device_caches.clear()

    @property
    def compiled(self) -> int:
        """How many kernels were compiled, or loaded from the disk."""
        return sum(map(_compiled, self.kernels))

    @property
    def launches(self) -> int:
        """How many there were, failed ones too."""
        count: int = self.number("launches").value
        return count

    def fail(self, after: int, error: int) -> None:
        """One launch, after so many that succeed, ends with this CUresult."""
        self.number("failing").value, self.number("error").value = self.launches + after, error

    @property
    def failed(self) -> bool:
        return 0 <= self.number("failing").value < self.launches


class _Driver:
    """As Triton's."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": H200.shared, "warpSize": H200.warp},
            load_binary=lambda name, binary, shared, device: stub.load(),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(H200.backend, H200.arch, H200.warp)

    def get_current_device(self) -> int:
        return self._stub.device

    def get_current_stream(self, device: int) -> int:
        return self._stub.streams[device]


def install() -> Stub:
    """The stub in the place of GPU and driver."""
    stub = Stub(ctypes.CDLL("libcuda.so.1"))

    class Entered:
        """torch.cuda.device."""

        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before = stub.device
            stub.device = self.before if self.index is None else self.index

        def __exit__(self, *error: Any) -> None:
            stub.device = self.before

    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        sent, before = list(_flat(args)), stub.launches
        stub.number("parameters").value = len(sent)
        stub.kernels.add(self)
        kernel = launch(self, *args, grid=grid, warmup=warmup, **options)
        got = (ctypes.c_uint64 * 256).in_dll(stub.library, "stub_values")
        made = Launched(
            f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}", stub.launches - before, [*grid, 1, 1][:3],
            [*(ctypes.c_uint * 3).in_dll(stub.library, "stub_grid")], len(sent),
            [k for k, value in enumerate(sent) if not _arrived(value, got[k])],
            bool(stub.number("cooperative").value), bool(options.get("BARRIER")),
            _compiled(self), stub.device,
            ctypes.c_uint64.in_dll(stub.library, "stub_stream").value,
        )  # fmt: skip
        stub.launched.append(made)
        if stub.told is not None:
            stub.told(made)
        return kernel

    triton.runtime.driver.set_active(_Driver(stub))
    nvidia.library_dirs = lambda: [os.environ[FOLDER]]
    torch.cuda.device = Entered  # type: ignore[assignment,misc]
    torch.cuda.device_of = lambda t: Entered(t.device)  # type: ignore[assignment,misc]
    torch.cuda.current_device = lambda: stub.device
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.nn.RNNBase.flatten_parameters = lambda self: None  # type: ignore[method-assign]  # cuDNN would
    devices.of = lambda index: H200  # type: ignore[assignment]
    _triton.torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))  # type: ignore[assignment]
    JITFunction.run = run  # type: ignore[method-assign]
    return stub


def _compiled(kernel: JITFunction) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def _flat(arg: Any) -> Iterator[Any]:
    """What of an argument reaches the driver: None does not."""
    if isinstance(arg, tuple):
        for part in arg:
            yield from _flat(part)
    elif arg is not None:
        yield arg


def _arrived(sent: Any, got: int) -> bool:
    """Addresses take eight bytes, numbers four."""
    if isinstance(sent, Tensor):
        return got == sent.data_ptr()
    number = struct.unpack("I", struct.pack("f", sent))[0] if isinstance(sent, float) else sent & 0xFFFFFFFF
    return got & 0xFFFFFFFF == number
