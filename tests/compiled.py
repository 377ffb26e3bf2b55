"""What a `Launch` becomes on a device that this machine has not: compiled ahead of time, and what that takes.

Arguments are specialized by Triton's own code, as its JIT does on a machine with that GPU.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fastseq.kernels.configs import TABLE, find
from fastseq.kernels.devices import Device
from fastseq.kernels.launch import Launch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, compute_cache_key, create_function_from_signature

__all__ = ["Resources", "check", "compile_key", "compile_launch", "faults", "loop_instructions", "ttir", "unmet_rows"]

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Resources(NamedTuple):
    """What one program of a compiled kernel takes."""

    shared: int  # bytes of shared memory
    registers: int  # of a thread; AMD: vector registers
    spills: int  # registers kept in memory within loops that compute, as instructions; AMD: bytes of scratch, anywhere


class Specialized(NamedTuple):
    """A launch's arguments as the JIT tells compilations apart, and what it hands the compiler."""

    key: str
    source: Any  # () -> ASTSource
    options: Any
    target: GPUTarget


def compile_key(launch: Launch, device: Device) -> str:
    """Launches of one kernel with the same key share one compilation."""
    return _specialized(launch, device).key


def compile_launch(launch: Launch, device: Device) -> Resources:
    """What `launch` takes on `device`; each distinct kernel and target is compiled once."""
    made = _specialized(launch, device)
    known = (launch.kernel, made.key)
    if known not in _compiled:
        options = launch.options(device)
        _compiled[known] = _resources(triton.compile(made.source(), target=made.target, options=options), device)
    return _compiled[known]


def loop_instructions(launch: Launch, device: Device) -> list[Counter[str]]:
    """Names of SASS instructions of each innermost loop that computes, on one of NVIDIA's devices."""
    made = _specialized(launch, device)
    kernel = triton.compile(made.source(), target=made.target, options=launch.options(device))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        loops = _hot_loops(_cuobjdump("-sass", file.name))
    return [Counter(re.sub(r"^@\S+ ", "", text).split()[0] for text in body) for body in loops]


def faults(found: Resources, device: Device) -> list[str]:
    """Why a kernel that takes this must not be shipped for `device`."""
    most, wrong = 512 if device.backend == "hip" else 255, []
    if found.shared > device.shared:
        wrong.append(f"{found.shared} bytes of shared memory, {device.name} has {device.shared}")
    if found.spills:
        wrong.append(f"{found.spills} spills in a hot loop")
    if found.registers > most:
        wrong.append(f"{found.registers} registers of {most}")
    return wrong


def ttir(launch: Launch, device: Device) -> str:
    """The kernel's first form, every function inlined, with the lines of the source: in a tenth of a second."""
    made = _specialized(launch, device)
    source, backend, context = made.source(), make_backend(made.target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(made.options)
    module = source.make_ir(made.target, made.options, functions, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, made.options, source.language)
    return str(stages["ttir"](module, {}))


def check(launch: Launch, device: Device) -> None:
    """Raise AssertionError where `device` could not run `launch`, or only with its registers in memory."""
    found = compile_launch(launch, device)
    wrong = faults(found, device)
    assert not wrong, f"{launch.kernel.__name__} on {device.name}: {'; '.join(wrong)}; {launch.constants}"


def unmet_rows(prefix: str, sizes: Iterable[tuple[torch.dtype, int]], device: Device) -> list[str]:
    """Rows of configs.json, of kernels named so, that `device` takes for these dtypes, but at none of these sizes."""
    rows = [row for row in TABLE if row.kernel.startswith(prefix)]
    bounds = {bound for row in rows for bound in row.hidden if bound is not None}
    kernels, sizes = {row.kernel for row in rows}, list(sizes)
    others = [(dtype, bound) for dtype in {dtype for dtype, _ in sizes} for bound in bounds]

    def taken(of: list[tuple[torch.dtype, int]]) -> set[int]:
        return {id(find(kernel, dtype, hidden, device)) for kernel in kernels for dtype, hidden in of}

    wanted = taken(others) - taken(sizes)
    return [f"{row.kernel} {row.bits} {row.hidden}" for row in rows if id(row.config) in wanted]


_compiled: dict[tuple[Any, str], Resources] = {}


@lru_cache(maxsize=256)
def _binder(kernel: Any, target: GPUTarget) -> tuple[Any, Any]:
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _specialized(launch: Launch, device: Device) -> Specialized:
    target = GPUTarget(device.backend, device.arch, device.warp)
    kernel = launch.kernel
    backend, bind = _binder(kernel, target)
    keywords = {**launch.constants, **launch.options(device), "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = bind(*map(_mock, launch.args), **keywords)
    key = compute_cache_key({}, specialization, {**options, "target": str(target)})

    def source() -> ASTSource:
        _, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, options)
        return ASTSource(kernel, signature, constexprs, attrs)

    return Specialized(str(key), source, backend.parse_options(keywords), target)


def _mock(arg: Any) -> Any:
    """A tensor as the JIT sees it: its dtype and its address, a multiple of 16."""
    if isinstance(arg, Tensor):
        return MockTensor(arg.dtype)
    if isinstance(arg, tuple):
        return type(arg)(*map(_mock, arg)) if hasattr(arg, "_fields") else tuple(map(_mock, arg))
    return arg


def _resources(kernel: Any, device: Device) -> Resources:
    if device.backend == "hip":
        listing = kernel.asm["amdgcn"]
        count = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)", listing)}
        return Resources(kernel.metadata.shared, count["vgpr_count"], count["private_segment_fixed_size"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, listing = _cuobjdump("-res-usage", file.name), ""
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, *local = map(int, found.groups())
        if any(local):
            listing = _cuobjdump("-sass", file.name)
    return Resources(kernel.metadata.shared, registers, hot_spills(listing))


def _cuobjdump(option: str, path: str) -> str:
    done = subprocess.run([_BIN / "cuobjdump", option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def hot_spills(listing: str) -> int:
    """Loads and stores of local memory within the innermost loops that compute, of SASS.

    What is kept in memory across such loops, and read once for each of their tiles, costs nothing that shows.
    """
    return sum(bool(re.search(r"\b(LDL|STL)", text)) for body in _hot_loops(listing) for text in body)


def _hot_loops(listing: str) -> list[list[str]]:
    """The innermost loops that compute, of SASS."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", listing)]
    jumps = [(at, re.search(r"\bBRA 0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(to.group(1), 16), at) for at, to in jumps if to is not None and int(to.group(1), 16) < at]
    found = []
    for first, last in loops:
        inner = any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
        body = [text for at, text in code if first <= at <= last]
        if not inner and any(re.search(r"\b(HMMA|HGMMA|FFMA|MUFU)", text) for text in body):
            found.append(body)
    return found
