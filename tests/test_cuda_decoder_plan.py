"""How a decoder's loop is laid out on GPUs that are not here: memory as the kernels count it, limits, choices."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from fastseq.cuda import decoder_plan, native
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


def made(
    name: str, forward: bool, H: int = 512, A: int = 512, D: int = 512, masks: bool = False, V: int = 0
) -> Program:
    """A program of sizes like a model's; of a search where V is not 0."""
    loop = LOOPS[name]
    attends, fed, inputs, read = loop.attend != "none", loop.feed == "output", 7, 96
    if V and not fed:
        loop = loop._replace(readout=("context", "state") if attends else ("state",))
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
        not V, V,
    )  # fmt: skip
    return program(loop, dims, forward)


@pytest.mark.parametrize("way", ["forward", "backward", "search"])
@pytest.mark.parametrize("name", LOOPS)
def test_memory_is_what_the_kernels_count(name: str, way: str, emulated: Any) -> None:
    draw = random.Random(name)
    for _ in range(20):
        V = draw.randint(1, 600) if way == "search" else 0
        sizes_of = (draw.randint(1, 70) for _ in range(3))
        of = made(name, way != "backward", *sizes_of, masks=not V and draw.random() < 0.5, V=V)
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
        numbers = (9, 3, S, 1, True, True, 2, 0, 1)
        counted = emulated.decoder_sizes(
            emulated.DecoderProgram(of.flat()), native.KINDS[kind], numbers, shape.native(), near
        )
        assert counted == (found.shared, found.packed * blocks), (of, shape)


@pytest.mark.parametrize("device", [H200, B200, A100], ids=lambda d: d.name)
@pytest.mark.parametrize("name", LOOPS)
def test_plans_fit(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is laid out fits its GPU and all rows are run; what is printed has the reasons for the speed."""
    monkeypatch.setattr(decoder_plan, "_CHOOSING", math.inf)  # no search is predicted to be faster step by step
    for N, S in ((1, 30), (64, 64), (256, 200)):
        for kind in native.KINDS:
            for forward, V in ((True, 0), (False, 0), (True, 999)):
                of = made(name, forward, V=V)
                every = list(candidates(of, N, S, kind, device))
                assert every
                for p in every:
                    s = p.shape
                    assert p.shared <= device.shared
                    assert s.blocks * s.groups <= device.units
                    assert s.rows * s.groups * p.waves >= N
                    assert s.rows % s.chunk == 0
                    assert s.pieces <= s.blocks
                    assert V == 0 or p.near[-1] == 1
                    if s.design == "cluster":
                        assert (s.blocks, s.groups) <= (s.blocks, dict(device.clusters)[s.blocks])
                best = plan(of, N, S, kind, device)
                assert best in every
                assert best.step * best.waves == min(p.step * p.waves for p in every)
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


@pytest.mark.parametrize("kind", ["brain_half", "full32"])
def test_how_large_a_vocabulary_may_be(kind: str) -> None:
    """Its weights must stay in shared memory, and a launch must be predicted to be faster than a step by step."""
    large = 1 << 15
    small = plan(made("luong", True, V=1000), 32, 64, kind, H200)
    assert small.near[-1] == 1
    assert "vocabulary" in str(small)
    assert "search: " in str(small)
    with pytest.raises(CannotPlan, match=f"weights of {large * 9} tokens x 96 features in {kind} do not fit"):
        plan(made("luong", True, V=large * 9), 32, 64, kind, H200)
    assert plan(made("luong", True, V=large), 1, 64, kind, H200, 32).shape.design == "grid"
    with pytest.raises(CannotPlan, match=r"4096 rows is predicted to take \d+ us in one launch, .*; \d+ us with"):
        plan(made("luong", True, V=large), 4096, 64, kind, H200, 32)
    with pytest.raises(CannotPlan, match="hidden_size=4096 with 100000 source positions needs"):
        plan(made("luong", True, 4096, 4096, 4096, V=1000), 64, 100000, "full32", A100)


def test_tables_of_all_tokens_take_time() -> None:
    """Which a search of few steps does not earn back; of many, no more than 32 are believed in."""
    of = made("luong", True, V=1 << 15)
    with pytest.raises(CannotPlan, match=r"launch, (\d+) of them for its part of tables of all tokens, which 1 steps"):
        plan(of, 1, 64, "full32", H200, 1)
    slow = replace(H200, memory_bytes=H200.memory_bytes / 64)
    with pytest.raises(CannotPlan, match="which 32 steps read"):
        plan(of, 1, 64, "full32", slow, 1000)
    product = replace(H200, vector_flops=H200.vector_flops / 1000)
    with pytest.raises(CannotPlan, match="which 32 steps read"):
        plan(of._replace(dims=of.dims._replace(I=1 << 12)), 1, 64, "full32", product, 32)


@pytest.mark.parametrize("kind", ["brain_half", "full32"])
def test_tables_of_all_tokens_take_memory(kind: str) -> None:
    """Of a readout that reads the input without weights of its own, V * V."""
    large = LOOPS["bahdanau"]._replace(readout=("state", "input"))
    of = program(large, Dims(7, 16, 16, 16, 0, 23, (23,), True, True, False, False, False, 30000), True)
    element = 4 if kind == "full32" else 2
    found, limit = (30000 * 30048 * element >> 20), H200.memory // 256 >> 20
    expected = f"30000 tokens x 30048 numbers in {kind}, {found} MiB; at most 1/256 of the memory of H200, {limit} MiB"
    with pytest.raises(CannotPlan, match=expected) as told:
        plan(of, 4, 8, kind, H200, 1 << 20)
    assert "with weights of its own (combine) a readout of the input has a smaller one" in str(told.value)
    few = replace(H200, memory=H200.memory // 8)
    with pytest.raises(CannotPlan, match=r"MiB, is taken for it$"):
        plan(made("luong", True, V=1 << 15), 4, 8, kind, few, 32)
    wide = replace(H200, memory=H200.memory * 8)
    assert plan(of, 4, 8, "brain_half", wide, 1 << 20).way == "search"
