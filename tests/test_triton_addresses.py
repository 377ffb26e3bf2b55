"""Tensors of more than 2**31 elements: no address of any Triton kernel is made in 32 bits that may not hold it.

What is shown, and what is assumed of sizes, says tests/addresses.py. A GPU decides nothing of it but the barrier.
"""

import ast
import importlib
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton")
import fastseq.kernels  # noqa: E402
import triton.language as tl  # noqa: E402
from fastseq.kernels import attention, decoder, launch  # noqa: E402
from fastseq.kernels.cells import CELLS  # noqa: E402
from fastseq.kernels.configs import TABLE  # noqa: E402
from fastseq.kernels.devices import DEVICES, Device  # noqa: E402
from fastseq.kernels.launch import Launch, cdiv  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastseq.backends import decoder_fused  # noqa: E402
from fastseq.errors import InputError  # noqa: E402
from fastseq.spec import DecoderSpec  # noqa: E402
from tests import test_triton_compiled_attention as attentions  # noqa: E402
from tests import test_triton_compiled_decoder as decoders  # noqa: E402
from tests import test_triton_compiled_norm as norms  # noqa: E402
from tests import test_triton_compiled_rnn as layers  # noqa: E402
from tests.addresses import LARGEST, overflows  # noqa: E402
from tests.compiled import compile_key  # noqa: E402
from tests.decoder_oracle import PRESETS  # noqa: E402

H200, MI300X = (next(device for device in DEVICES if device.arch == arch) for arch in (90, "gfx942"))
BF16, FP32 = torch.bfloat16, torch.float32
WIDE = 32768  # whose matrices of weights have more than 2**31 elements
OPTIONS = (("full", ""), ("lengths", "mean"), ("packed", "update"), ("resets", "state"))  # of rows, and masks

Case = Callable[[Device, int], list[Launch]]  # (device, a factor of every size but those of the model and T)


def attention_calls(device: Device, factor: int, width: int = 512) -> list[Launch]:
    """Both forms, both sets of results, and few queries."""
    sizes = (4 * factor, 2, 9 * factor, 70 * factor, width, width)
    found = []
    for dtype, additive, extras in ((BF16, True, True), (FP32, True, False), (FP32, False, True), (BF16, False, False)):
        found += attentions.launches(device, dtype, additive, sizes, mask=extras, weights=extras)
    return found + attentions.launches(device, BF16, True, (4 * factor, 1, 1, 70 * factor, width, width))


def key_gradients(device: Device, factor: int) -> list[Launch]:
    """As a decoder's loop asks for them."""
    with FakeTensorMode(), launch.recording(device) as noted:
        q, keys, _, mask, v = attentions.operands(BF16, True, (4 * factor, 2, 9 * factor, 70 * factor, 512, 512), True)
        attention.key_gradients(q, keys, v, q.new_empty(q.shape[0], q.shape[1], keys.shape[1], dtype=FP32), mask)
    return noted


def decoder_loops(device: Device, factor: int, width: int = 512) -> list[Launch]:
    """Every preset that loops with every mask, and a step of a search."""
    found = []
    for name in decoders.LOOPED:
        sizes = (64 * factor, 64 * factor, 3, 64 * factor, width)
        found += decoders.launches(device, decoders.loop_of(name), BF16, *sizes, masks=True, weights=True)
    for name in ("luong", "bahdanau"):
        loop = decoders.loop_of(name)
        with launch.recording(device) as noted:
            decoder.forward(loop, decoders.tensors(loop, BF16, 64, 64, 1, 64, width, False), True, False)
        found += noted
    return found


def decoder_cells(device: Device, factor: int) -> list[Launch]:
    """Two layers of every cell; a dot score."""
    found = []
    for cell in ("lstm", "gru", "gru_reset_before"):
        loop = decoder_fused.make_plan(DecoderSpec(cell=cell, **(PRESETS["luong"] | {"num_layers": 2}))).loop
        assert loop is not None
        found += decoders.launches(device, loop, FP32, 64 * factor, 32 * factor, 3, 70 * factor, 100)
    return found


def layers_of(hidden: int, cells: tuple[str, ...] = ("lstm", "gru")) -> Case:
    def case(device: Device, factor: int) -> list[Launch]:
        found = []
        for cell in cells:
            for rows, noise in OPTIONS:
                shape = layers.Shape(cell, BF16, hidden, False, False, rows != "full", rows, noise)
                found += layers.launches(shape, device, 8 * factor)
        return found

    return case


def single_steps(device: Device, factor: int, width: int = 256) -> list[Launch]:
    found = []
    for cell, dtype in (("lstm", BF16), ("gru", BF16), ("lstm", FP32)):
        found += layers.launches(layers.Shape(cell, dtype, width, one_step=True), device, 8 * factor, features=width)
    return found


def norms_of(hidden: int, options: tuple[tuple[str, str], ...] = OPTIONS[2:]) -> Case:
    def case(device: Device, factor: int) -> list[Launch]:
        found = []
        for cell in ("lstm", "gru"):
            for rows, noise in options:
                found += norms.launches(norms.Shape(cell, BF16, hidden, rows, noise), device, 8 * factor)
        return found

    return case


CASES: dict[str, Case] = {
    "attention": attention_calls,
    "key gradients": key_gradients,
    "decoder": decoder_loops,
    "decoder cells": decoder_cells,
    "layers, one program": layers_of(64),
    "layers, a grid": layers_of(512),
    "one step": single_steps,
    "normalised layers, one program": norms_of(64),
    "normalised layers, a grid": norms_of(512),
}
HUGE: dict[str, Case] = {
    "attention": lambda device, factor: attention_calls(device, factor, WIDE),
    "decoder": lambda device, factor: decoder_loops(device, factor, WIDE),
    "layers": layers_of(WIDE),
    "one step": lambda device, factor: single_steps(device, factor, WIDE),
    "normalised layers": norms_of(WIDE, OPTIONS[3:]),
}
ON_AMD: dict[str, Case] = {
    "decoder": decoder_loops, "layers": layers_of(512, ("lstm",)), "normalised layers": norms_of(512, OPTIONS[3:])
}  # fmt: skip


def most_programs(one: Launch, larger: Launch, axis: int) -> int | None:
    """Along an axis of the grid of a launch, here at two sizes: as many as there are, if no size changes it; as blocks
    of the largest size, where it is blocks of one; otherwise nobody knows.
    """
    n, m = one.grid[axis], larger.grid[axis]
    if n == m and axis:  # the first axis may have a program a compute unit
        return n
    sizes = [both for both in zip(one.args, larger.args, strict=True) if isinstance(both[0], int)]
    blocks = [block for name, block in one.constants.items() if name.startswith("BLOCK_")]
    of_one = [block for size, of in sizes for block in blocks if (n, m) == (cdiv(size, block), cdiv(of, block))]
    return min((cdiv(LARGEST, block) for block in of_one), default=None)


def unsound(case: Case, device: Device) -> list[str]:
    """Of every distinct compilation of a case."""
    found: dict[Any, list[str]] = {}
    for one, larger in zip(case(device, 1), case(device, 100), strict=True):
        assert one.kernel is larger.kernel
        key = one.kernel, compile_key(one, device)
        if key not in found:
            found[key] = overflows(one, device, [most_programs(one, larger, axis) for axis in range(len(one.grid))])
    return [fault for faults in found.values() for fault in faults]


@pytest.mark.parametrize("name", CASES)
def test_any_batch_and_any_length(name: str) -> None:
    """B, T, S, M and N may each be near 2**31, and their products beyond."""
    assert unsound(CASES[name], H200) == []


@pytest.mark.parametrize("name", HUGE)
def test_weights_of_more_than_32_bits(name: str) -> None:
    assert unsound(HUGE[name], H200) == []


@pytest.mark.parametrize("name", ON_AMD)
def test_a_launch_for_each_step(name: str) -> None:
    """Where no grid waits."""
    assert unsound(ON_AMD[name], MI300X) == []


def functions() -> Iterator[tuple[str, JITFunction[Any]]]:
    """All that Triton compiles of kernels/, helpers too."""
    for module in pkgutil.iter_modules(fastseq.kernels.__path__, "fastseq.kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.name:
                yield name, value


@lru_cache(maxsize=1)
def started() -> list[Launch]:
    return [one for case in CASES.values() for one in case(H200, 1)]


def test_every_kernel_is_looked_at() -> None:
    """A kernel is what neither another function calls nor a kernel is handed."""
    handed = {value for one in started() for value in one.constants.values() if isinstance(value, JITFunction)}
    handed |= {function for cell in CELLS.values() for function in (cell.forward, cell.backward)}
    called = {
        node.id if isinstance(node, ast.Name) else node.attr
        for _, function in functions()
        for node in ast.walk(ast.parse(textwrap.dedent(function.src)))
        if isinstance(node, (ast.Name, ast.Attribute))
    }
    kernels = {function for name, function in functions() if name not in called and function not in handed}
    assert {one.kernel for one in started()} == kernels
    assert len(kernels) == 19


@triton.jit(do_not_specialize=["S"])
def row_in_32_bits(p, S):
    tl.store(p + tl.program_id(0) * S + tl.arange(0, 16), 0.0)


@triton.jit(do_not_specialize=["S"])
def row_widened_late(p, S):
    row = (tl.program_id(0) * S).to(tl.int64)
    tl.store(p + row + tl.arange(0, 16), 0.0)


@triton.jit(do_not_specialize=["T"])
def steps_in_32_bits(p, T):
    for t in range(T):
        tl.store(p + t * 512, 0.0)


@triton.jit(do_not_specialize=["T"])
def carried_in_32_bits(p, T):
    at = 0
    for _ in range(T):
        tl.store(p + at, 0.0)
        at += 512


@triton.jit(do_not_specialize=["S", "N"])
def bound_in_32_bits(p, S, N):
    for i in range(S * N):
        tl.store(p + i, 0.0)


@triton.jit(do_not_specialize=["S", "N"])
def mask_in_32_bits(p, S, N):
    n = tl.program_id(0)
    tl.store(p + n.to(tl.int64) * S, 0.0, n * S < N)


@triton.jit(do_not_specialize=["S", "T"])
def sound(p, S, T):
    """In 64 bits what may be large; in 32 a size rounded up to blocks, a remainder, a minimum, a tile's number."""
    blocks = tl.cdiv(S, 128)
    row = (tl.program_id(0) // blocks).to(tl.int64) * S
    at = tl.program_id(0) % blocks * 128 + tl.arange(0, 128)
    for tile in range(tl.program_id(0), blocks * T, tl.num_programs(0)):
        tl.store(p + row + at, 0.0, at < S)
        tl.store(p + tl.minimum(tile, 100) * 1024, 0.0)


@pytest.mark.parametrize(
    ("kernel", "line", "told"),
    [
        (row_in_32_bits, 1, r"muli of \[0, 2147483646\] and \[0, 2147479552\] at {} is an address"),
        (row_widened_late, 1, r"muli of .* at {} is an address"),
        (steps_in_32_bits, 2, r"muli of \[0, 2147479551\] and \[512, 512\] at {} is an address"),
        (carried_in_32_bits, 4, r"addi of .* and \[512, 512\] at {} is an address"),
        (bound_in_32_bits, 1, r"muli of .* at {} is an address"),
        (mask_in_32_bits, 2, r"muli of .* at {} is a store's mask"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found(kernel: Any, line: int, told: str) -> None:
    """Its kernel and its line are named."""
    args = (torch.empty(16), *[5] * (len(kernel.params) - 1))
    (fault,) = overflows(Launch(kernel, (4,), args, {}), H200)
    place = f"test_triton_addresses.py:{kernel.starting_line_number + 1 + line}"  # behind the decorator
    assert fault.startswith(f"{kernel.__name__}: ")
    assert re.search(told.format(place), fault), fault


def test_what_is_right_is_passed() -> None:
    assert overflows(Launch(sound, (4,), (torch.empty(16), 5, 5), {}), H200) == []


@pytest.mark.parametrize("programs", [None, 3])
def test_a_size_that_changes_the_grid_is_any(programs: int | None) -> None:
    """As many programs along an axis as the model's sizes say, or as the GPU takes."""
    planted = Launch(second_axis, (4, 3), (torch.empty(16),), {})
    assert bool(overflows(planted, H200, (None, programs))) == (programs is None)


@triton.jit
def second_axis(p):
    tl.store(p + tl.program_id(1) * 65536, 0.0)


def test_a_grid_that_is_too_large_is_refused() -> None:
    """By name: along the second axis a GPU takes 65,535 programs."""
    planted = Launch(second_axis, (1, 65536), (torch.empty(16),), {})
    with launch.recording(H200), pytest.raises(InputError, match=r"second_axis needs \(1, 65536\) programs, the limit"):
        launch.run(planted.args[0], planted)


def test_sources_of_any_length() -> None:
    """What grows with the data is the first axis, which takes 2**31 - 1."""
    for additive, queries in ((True, 1), (True, 5), (False, 5)):
        started = attentions.launches(H200, BF16, additive, (1, 1, queries, 2**24, 64, 64))
        assert all(one.grid[1:] in ((), (1,)) for one in started)


def test_the_largest_size_may_be_rounded_up() -> None:
    """To any tile of configs.json."""
    assert max(block for row in TABLE for block in row.config.blocks.values()) <= 2**31 - LARGEST


def test_a_size_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is assumed is needed: with sizes of all 32 bits a tile's end is beyond."""
    monkeypatch.setattr("tests.addresses.LARGEST", 2**31 - 1)
    assert overflows(Launch(sound, (4,), (torch.empty(16), 5, 5), {}), H200) != []
