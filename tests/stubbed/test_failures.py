"""A launch that fails, a kernel that cannot be compiled, loaded or run: the caller sees why, and later calls work."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from fastseq.kernels import rnn
from fastseq.kernels.configs import Config

import fastseq
from tests.kinds import KINDS, Kind, Sizes
from tests.stub_driver import H200, LOADED, Launched, Stub

SIZES = Sizes(I=32, H=48, D=32, most=300)
ERRORS = {
    701: "too many resources requested for launch", 2: "out of memory", 720: "too many blocks in cooperative launch"
}  # fmt: skip


def launches_of(gpus: Stub, kind: Kind) -> list[Launched]:
    """Those of a training step."""
    before = len(gpus.launched)
    kind.step()
    return gpus.launched[before:]


def traits(made: Sequence[Launched]) -> list[Any]:
    return [(one.kernel, one.grid, one.arguments, one.lost, one.cooperative, one.compiled) for one in made]


@pytest.mark.parametrize("name", KINDS)
def test_a_launch_fails(name: str, gpus: Stub) -> None:
    """Each of a training step in turn. Then the step as it was before: no compilation, and every argument there."""
    kind = Kind.of(name, SIZES)
    kind.step()
    expected = launches_of(gpus, kind)
    for k in range(len(expected)):
        code, text = list(ERRORS.items())[k % len(ERRORS)]
        gpus.fail(k, code)
        with pytest.raises(RuntimeError, match=rf"Triton Error \[CUDA\]: {text}"):
            kind.step()
        assert gpus.failed
        assert gpus.device == 0
    assert traits(launches_of(gpus, kind)) == traits(expected)
    assert all(not one.lost for one in expected)


def test_in_the_middle_of_a_loop(gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has a launch for each step, as AMD's do."""
    monkeypatch.setattr(type(H200), "cooperative", False)
    kind = Kind.of("lstm, step by step", SIZES)
    kind.step()
    expected = launches_of(gpus, kind)
    assert len(expected) == 2 * SIZES.T
    for k in (1, SIZES.T + 1):
        gpus.fail(k, 701)
        with pytest.raises(RuntimeError, match="too many resources"):
            kind.step()
    assert traits(launches_of(gpus, kind)) == traits(expected)
    assert not any(one.cooperative for one in expected)


@pytest.mark.parametrize("name", ["lstm", "luong", "attention, additive"])
def test_no_room_for_a_kernel(name: str, gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first launch loads it, which takes the device's memory: for each kernel in turn that fails once."""
    kind, loads, room = Kind.of(name, SIZES), 0, 99

    def load() -> tuple[int, ...]:
        nonlocal loads, room
        if not room:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        loads, room = loads + 1, room - 1
        return LOADED

    monkeypatch.setattr(gpus, "load", load)
    gpus.forget()
    kind.step()
    expected, kernels, room = launches_of(gpus, kind), loads, 0
    gpus.forget()
    for _ in range(kernels):
        with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]: out of memory"):
            kind.step()
        room = 1
    assert traits(launches_of(gpus, kind)) == traits(expected)
    assert (loads, room) == (2 * kernels, 0)


def test_a_kernel_that_does_not_compile(gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind.of("lstm", SIZES)
    kind.step()
    expected, find = launches_of(gpus, kind), rnn.find

    def odd(*call: Any) -> Config | None:
        config = find(*call)
        return config and replace(config, blocks=config.blocks | {"rows": 3})

    monkeypatch.setattr(rnn, "find", odd)
    for _ in range(2):
        with pytest.raises(triton.CompilationError, match="arange's range must be a power of 2"):
            kind.step()
    monkeypatch.undo()
    assert traits(launches_of(gpus, kind)) == traits(expected)


def test_a_kernel_too_large_for_the_device(gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error again, and none for the others."""
    gpus.forget()
    small, large = Kind.of("attention, additive", SIZES), Kind.of("luong", SIZES)
    small.step()
    expected = launches_of(gpus, small)
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda device: 1024)
    for _ in range(2):
        with pytest.raises(triton.OutOfResources, match=r"shared memory, Required: .* Hardware limit: 1024"):
            large.step()
    assert traits(launches_of(gpus, small)) == traits(expected)


def test_a_launch_fails_in_warmup(gpus: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either mode, forward and backward: nothing can be told from before."""
    monkeypatch.setattr(importlib.import_module("fastseq.warmup"), "_gpus", lambda tensors: [])  # no random state there
    module, x = fastseq.LSTM(32, 48, zoneout=0.1, backend="triton"), torch.randn(3, 4, 32, requires_grad=True)
    before = gpus.launches
    fastseq.warmup(module, x)
    count = gpus.launches - before
    assert count == 3
    random = torch.get_rng_state()
    for k in range(count):
        gpus.fail(k, 701)
        with pytest.raises(RuntimeError, match="too many resources"):
            fastseq.warmup(module, x)
        assert gpus.failed
        assert module.training
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), random)
        assert all(t.grad is None for t in (x, *module.parameters()))
