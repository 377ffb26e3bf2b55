"""How a decoder's loop is laid out on GPUs that are not here: memory as the kernels count it, limits, choices."""

import random
from dataclasses import replace
from typing import Any

import pytest

from fastseq.cuda import native
from fastseq.cuda.decoder_phases import Dims, Program
from fastseq.cuda.decoder_plan import DecoderShape, candidates, plan, sizes, tiles_of
from fastseq.cuda.decoder_program import program
from fastseq.cuda.devices import A100, B200, H200
from fastseq.cuda.plan import CannotPlan
from fastseq.ops.decoder_types import LoopSpec
from tests.emulated import emulated

__all__ = ["emulated"]

LOOPS = {
    "luong": LoopSpec("lstm", "after", 0, (False,), "output", "tanh", ("context", "state")),
    "bahdanau": LoopSpec("gru", "before", 0, (True,)),
    "gnmt": LoopSpec("lstm", "after", 0, (False, True), "context"),
    "conditional": LoopSpec("gru_reset_before", "between", 0, (False, True)),
    "everything": LoopSpec(
        "gru_reset_before", "after", 0, (False, True), "output", "maxout", ("state", "prev_state", "input", "context")
    ),
    "no attention": LoopSpec("lstm", feed="output", readout=("state",)),
}  # fmt: skip


def made(name: str, forward: bool, H: int = 512, A: int = 512, D: int = 512, masks: bool = False) -> Program:
    """A program of sizes like a model's."""
    loop = LOOPS[name]
    attends, fed, inputs, read = loop.attend != "none", loop.feed == "output", 7, 96
    D, A = (D, A) if attends else (0, 0)
    pitches = []
    for i in range(loop.cells):
        below = (
            inputs + {"none": 0, "context": D, "output": read}[loop.feed]
            if i == 0
            else 0
            if loop.attend == "between"
            else H
        )
        pitches.append(below + D * loop.contexts[i])
    columns = sum({"context": D, "input": inputs}.get(part, H) for part in loop.readout)
    dims = Dims(
        inputs, H, A, D, read * fed, columns, tuple(pitches), attends, attends, masks and loop.cells > 1, masks and fed,
        True,
    )  # fmt: skip
    return program(loop, dims, forward)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("name", LOOPS)
def test_memory_is_what_the_kernels_count(name: str, forward: bool, emulated: Any) -> None:
    draw = random.Random(name)
    for _ in range(20):
        of = made(name, forward, *(draw.randint(1, 70) for _ in range(3)), masks=draw.random() < 0.5)
        kind, S, blocks = draw.choice([*native.KINDS]), draw.randint(0, 40), draw.randint(1, 16)
        chunk = draw.choice((8, 16))
        near = tuple(draw.randint(0, tiles_of(of, s, kind)) for p in of.phases for s in p.segments)
        pieces, keys, memory = (
            (draw.randint(1, blocks), draw.random() < 0.5, draw.random() < 0.5) if of.attends else (1, False, False)
        )
        shape = DecoderShape(
            draw.choice(("cluster", "grid")), blocks, chunk * draw.randint(1, 3), 1, chunk, pieces, near, keys, memory
        )
        found = sizes(of, shape, S, kind)
        counted = emulated.decoder_sizes(
            emulated.DecoderProgram(of.flat()), native.KINDS[kind], (9, 3, S, 1, True, True), shape.native(), near
        )
        assert counted == (found.shared, found.packed * blocks), (of, shape)


@pytest.mark.parametrize("device", [H200, B200, A100], ids=lambda d: d.name)
@pytest.mark.parametrize("name", LOOPS)
def test_plans_fit(name: str, device: Any) -> None:
    """Whatever is laid out fits its GPU and all rows are run; what is printed has the reasons for the speed."""
    for N, S in ((1, 30), (64, 64), (256, 200)):
        for kind in native.KINDS:
            for forward in (True, False):
                of = made(name, forward)
                every = list(candidates(of, N, S, kind, device))
                assert every
                for p in every:
                    s = p.shape
                    assert p.shared <= device.shared
                    assert s.blocks * s.groups <= device.units
                    assert s.rows * s.groups * p.waves >= N
                    assert s.rows % s.chunk == 0
                    assert s.pieces <= s.blocks
                    if s.design == "cluster":
                        assert (s.blocks, s.groups) <= (s.blocks, dict(device.clusters)[s.blocks])
                best = plan(of, N, S, kind, device)
                assert best in every
                assert "us a step" in str(best)


def test_designs() -> None:
    """Small loops stay in clusters; without these, blocks meet through memory; a small one's weights all stay."""
    small = made("luong", True, 128, 128, 128)
    chosen = plan(small, 32, 32, "brain_half", H200)
    assert chosen.shape.design == "cluster"
    assert {near for near, units in zip(chosen.near, chosen.units, strict=True) if units} == {1.0}
    assert (chosen.shape.keys, chosen.shape.memory) == (True, True)
    assert plan(small, 32, 32, "brain_half", A100).shape.design in ("block", "grid")
    large = plan(made("luong", True), 64, 64, "brain_half", H200)
    assert "of the weights through L2" in str(large)


def test_too_much_for_a_gpu() -> None:
    of = made("luong", True, 4096, 4096, 4096)
    with pytest.raises(CannotPlan, match="hidden_size=4096 with 100000 source positions needs"):
        plan(of, 64, 100000, "full32", A100)
    assert plan(of, 8, 64, "full32", replace(A100, shared=1 << 20)).shared > A100.shared


def test_a_loop_of_too_many_cells(emulated: Any) -> None:
    numbers = made("gnmt", True).flat()
    with pytest.raises((ValueError, IndexError)):
        emulated.DecoderProgram(numbers[:-1])
    with pytest.raises(ValueError, match="more numbers"):
        emulated.DecoderProgram([*numbers, 0])
