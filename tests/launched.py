"""Calls on an H200 that is not there: all of their way through Triton to the driver, which is a stub.

Run by tests/test_triton_launched.py in a process of its own, with the stub as libcuda.so.1. Prints a line of JSON for
each launch: the kernel, its grid, whether it is cooperative, the number of compilations so far, and what of its
arguments did not arrive.
"""

import contextlib
import ctypes
import importlib
import json
import struct
import sys
from collections.abc import Iterator
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

import fastseq
from tests.decoder_oracle import AttentionCase, Problem, fast, preset, run

triton_layers = importlib.import_module("fastseq.backends.triton")
triton_decoders = importlib.import_module("fastseq.backends.decoder_triton")

H200 = next(device for device in DEVICES if device.arch == 90)
STUB = ctypes.CDLL("libcuda.so.1")


class Driver:
    """As Triton's, of one H200."""

    launcher_cls = nvidia.CudaLauncher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": H200.shared, "warpSize": H200.warp},
        load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, 1024),
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(H200.backend, H200.arch, H200.warp)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(folder: str) -> None:
    """The stub in the place of GPU and driver, CPU tensors in that of CUDA's. folder: the stub's, for the linker."""
    triton.runtime.driver.set_active(Driver())
    nvidia.library_dirs = lambda: [folder]
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment,misc]
    torch.cuda.current_device = lambda: 0
    devices.of = lambda index: H200  # type: ignore[assignment]
    for backend in (triton_layers, triton_decoders):
        backend.obstacle_on = lambda name, t: None  # type: ignore[attr-defined]
        backend.unavailable = lambda: None  # type: ignore[attr-defined]
    JITFunction.run = reported  # type: ignore[method-assign]


_run = JITFunction.run


def reported(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """Launches the kernel, and says what the driver got of it."""
    sent = list(flat(args))
    launches = ctypes.c_int.in_dll(STUB, "stub_launches")
    ctypes.c_int.in_dll(STUB, "stub_parameters").value, before = len(sent), launches.value
    kernel = _run(self, *args, grid=grid, warmup=warmup, **options)
    module = self.fn.__module__.rpartition(".")[2]
    got = (ctypes.c_uint64 * 256).in_dll(STUB, "stub_values")
    print(json.dumps({
        "kernel": f"{module}.{self.__name__}", "launches": launches.value - before, "asked": [*grid, 1, 1][:3],
        "grid": [*(ctypes.c_uint * 3).in_dll(STUB, "stub_grid")], "arguments": len(sent),
        "lost": [k for k, value in enumerate(sent) if not arrived(value, got[k])],
        "cooperative": bool(ctypes.c_int.in_dll(STUB, "stub_cooperative").value),
        "waits": bool(options.get("BARRIER")),
        "compiled": sum(len(cache[0]) for cache in self.device_caches.values()),
    }), flush=True)  # fmt: skip
    return kernel


def flat(arg: Any) -> Iterator[Any]:
    """What of an argument reaches the driver: None does not."""
    if isinstance(arg, tuple):
        for part in arg:
            yield from flat(part)
    elif arg is not None:
        yield arg


def arrived(sent: Any, got: int) -> bool:
    """Addresses take eight bytes, numbers four."""
    if isinstance(sent, Tensor):
        return got == sent.data_ptr()
    number = struct.unpack("I", struct.pack("f", sent))[0] if isinstance(sent, float) else sent & 0xFFFFFFFF
    return got & 0xFFFFFFFF == number


def main() -> None:
    """Training steps of every operator, each at two shapes. What they compute here is nothing."""
    for rows, steps in ((6, 4), (18, 7)):
        for layer in (
            fastseq.LSTM(32, 48, bidirectional=True, backend="triton"),
            fastseq.GRU(32, 300, backend="triton"),
            fastseq.LSTM(32, 48, zoneout=(0.1, 0.2), recurrent_dropout=0.3, backend="triton"),
            fastseq.LSTM(32, 300, zoneout=(0.1, 0.2), backend="triton").eval(),
            fastseq.GRU(32, 48, recurrent_dropout=0.3, recurrent_dropout_on="update", backend="triton"),
            fastseq.GRU(32, 48, layer_norm=True, backend="triton"),
            fastseq.LSTM(32, 300, layer_norm=True, bidirectional=True, backend="triton"),
        ):
            out, _ = layer(torch.randn(steps, rows, 32), lengths=torch.randint(1, steps, (rows,)))
            out.sum().backward()
        out, _, states = fastseq.LSTM(32, 48, backend="triton").forward_states(torch.randn(steps, rows, 32))
        (out.sum() + states.sum()).backward()
        cell = fastseq.LSTMCell(32, 48, backend="triton")
        cell(torch.randn(rows, 32, requires_grad=True))[0].sum().backward()
        sizes = {"N": rows, "B": rows // 2, "T": steps}
        run(fast("triton"), Problem.draw(AttentionCase("additive", **sizes)))
        run(fast("triton"), Problem.draw(AttentionCase("dot", **sizes)))
        for name, kind in (("luong", "lstm"), ("bahdanau", "gru_reset_before"), ("gnmt", "gru")):
            run(fast("triton"), Problem.draw(preset(name, kind, **sizes)))


if __name__ == "__main__":
    install(sys.argv[1])
    main()
