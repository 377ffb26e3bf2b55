"""A decoder's loop on the CUDA kernels, emulated, against the plain loops in float64: forward and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastseq.backends import decoder_fused
from fastseq.cuda import decoder as host
from fastseq.cuda import native
from fastseq.cuda.decoder_phases import TENSORS
from tests import cuda_decoder_layouts as layouts
from tests.cuda_decoder_layouts import drawn, fixed, looped_on_cuda
from tests.decoder_oracle import PRESETS, Case, Mismatch, Problem, check, check_second, fast, preset, run
from tests.emulated import emulated
from tests.oracle import compare
from tests.test_decoder import EVEN, decode, decoder_call

__all__ = ["emulated", "looped_on_cuda"]
pytestmark = pytest.mark.usefixtures("looped_on_cuda")

CELLS = ("lstm", "gru", "gru_reset_before")
SCORES = ("additive", "dot")
DESIGNS = ("block", "cluster", "grid")
# Every preset that loops, cells and scores in turn.
GRID = [
    preset(name, cell, score=SCORES[(i + j) % 2])
    for i, name in enumerate(PRESETS)
    for j, cell in enumerate(CELLS)
    if name != "sutskever" and (name, cell) != ("cho", "gru_reset_before")
]
SHAPES: dict[str, dict[str, Any]] = {
    "no source": {"S": 0},
    "one row, one step": {"N": 1, "B": 1, "T": 1},
    "five beams": {"N": 5, "B": 1, "T": 2, "mask": "prefix"},
    "more rows than a tile": {"N": 18, "B": 9, "T": 2, "S": 3},
    "more of all than a tile": {"N": 2, "B": 2, "T": 2, "S": 17, "A": 33, "D": 17, "H": 35, "R": 31, "I": 1},
    "smallest": {"N": 1, "B": 1, "T": 1, "S": 1, "A": 1, "D": 1, "I": 1, "H": 1, "R": 1, "mask": "none"},
    "no mask, weights, dropout": {"mask": "none", "weights": False, "dropout": False},
    "two layers": {"num_layers": 2, "T": 3},
}
step = fast("cuda")
every_design = pytest.mark.parametrize("design", DESIGNS)


@every_design
@pytest.mark.parametrize("number", range(len(GRID)), ids=lambda n: str(GRID[n]))
def test_presets(design: str, number: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 with everything that a call may have, each in another layout and schedule."""
    emulated.seed_schedule(number)
    with drawn(monkeypatch, design, number) as ran:
        check(step, GRID[number])
    assert {p.way for p in ran} == {"forward", "backward"}


@every_design
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "cell"),
    [("luong", "lstm"), ("joeynmt", "gru"), ("bentrevett", "gru"), ("conditional_gru", "gru_reset_before")],
)
def test_16_bits(name: str, cell: str, dtype: torch.dtype, design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets without maxout, where of two nearly equal pre-activations rounding chooses one, and a whole gradient."""
    with drawn(monkeypatch, design, 1):
        check(step, preset(name, cell, dtype=dtype, state=torch.float32 if cell == "gru" else None, **EVEN))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize(("name", "cell", "score"), [("luong", "lstm", "additive"), ("bahdanau", "gru", "dot")])
def test_shapes(options: str, name: str, cell: str, score: str, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = preset(name, cell, score=score, **SHAPES[options])
    for seed, design in enumerate(DESIGNS, 1):
        emulated.seed_schedule(seed)
        with drawn(monkeypatch, design, seed):
            check(step, case)


@every_design
@pytest.mark.parametrize("score", ["bare", "projected"])
def test_other_queries(score: str, design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An additive score of the state itself, and a dot score with a W_q."""
    with drawn(monkeypatch, design, 3):
        check(step, preset("luong", "gru", score=score, T=3))
        check(step, preset("bahdanau", "lstm", score=score, T=3))


def test_more_fours_of_tiles_than_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block with 10 tiles of units: some warps take two fours."""
    with fixed(monkeypatch, "block", 1, stays=False):
        check(step, preset("luong", "lstm", H=150, A=130, N=2, B=2, T=2, S=3))


@pytest.mark.parametrize("name", ["luong", "bahdanau", "gnmt"])
def test_where_weights_and_keys_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In shared memory or not, the same bits. Features in fours: others are summed in another order elsewhere."""
    sizes = {"N": 18, "B": 9, "T": 2, "S": 5, "A": 20, "D": 12}
    problem = Problem.draw(preset(name, "gru_reset_before" if name == "bahdanau" else "lstm", **sizes))
    found = []
    for stays in (True, False):
        with fixed(monkeypatch, "cluster", 3, 2, stays=stays):
            found.append(run(step, problem))
    assert all(torch.equal(t, found[1][key]) for key, t in found[0].items())


@pytest.mark.parametrize(("design", "blocks", "pieces"), [("block", 1, 1), ("cluster", 3, 2), ("grid", 3, 2)])
def test_schedules(design: str, blocks: int, pieces: int, emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever thread goes first, the same bits."""
    problem = Problem.draw(preset("luong", "lstm", T=3))
    with fixed(monkeypatch, design, blocks, pieces):
        want = run(step, problem)
        for seed in range(1, 7):
            emulated.seed_schedule(seed)
            assert all(torch.equal(t, want[key]) for key, t in run(step, problem).items()), seed


@every_design
def test_tf32(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as 11 bits of mantissa allow, and no exacter: the tensor cores are used."""
    problem = Problem.draw(preset("luong", "lstm", dropout=False))
    with drawn(monkeypatch, design, 5):
        want = run(step, problem)
    monkeypatch.setattr(host, "tf32_flag", lambda operator: operator == "matmul")
    monkeypatch.setattr(layouts, "tf32_flag", host.tf32_flag)
    with drawn(monkeypatch, design, 5) as ran:
        got = run(step, problem)
    assert {p.kind for p in ran} == {"tensor32"}
    compare(got, want, {key: 2**-11 * 16 * max(float(t.abs().max()), 1e-3) for key, t in want.items()})
    assert not torch.equal(got["out"], want["out"])


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn(monkeypatch, "cluster", 0):
        check_second(step, preset("luong", "gru", T=2, dropout=False))


def test_steps_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """T calls of one step each, the state handed on, give what one call of T steps gives."""
    call = decoder_call(preset("joeynmt", dropout=False))
    with fixed(monkeypatch, "cluster", 2):
        whole, state, outputs = decode(call, "cuda"), call.state, []
        for t in range(call.y.shape[1]):
            output, state, _ = decode(replace(call, y=call.y[:, t : t + 1], state=state), "cuda")
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output)


@every_design
def test_nan_stays_in_its_row(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.draw(preset("luong", N=6, B=6, mask="none", dropout=False))
    with drawn(monkeypatch, design, 7):
        clean = run(step, problem)
    for bad in ("y", "h0.0", "memory", "keys"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[bad][2] = torch.nan
        with drawn(monkeypatch, design, 7):
            got = run(step, replace(problem, tensors=tensors))
        others = torch.arange(6) != 2
        assert got["out"][2].isnan().any()
        for key in ("out", "weights", "h_n.0", "d_y", "d_h0.0", "d_memory", "d_keys"):
            assert torch.equal(got[key][others], clean[key][others]), (bad, key)


def test_backward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved stays as it was: a second backward gives the same bits."""
    problem = Problem.draw(preset("luong"))
    with fixed(monkeypatch, "cluster", 2):
        leaves = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
        outputs = step(problem, leaves)
        grads = [problem.grads[n].clone() for n in outputs]
        first, again = (
            torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads, retain_graph=True)
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_and_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, sliced and misaligned tensors."""
    call = decoder_call(preset("luong", dropout=False))
    with fixed(monkeypatch, "grid", 2):
        want = decode(call, "cuda")
        shifted = torch.empty(call.y.numel() + 1)[1:].view(call.y.shape)
        assert shifted.copy_(call.y).data_ptr() % 16
        transposed = call.y.transpose(0, 1).contiguous().transpose(0, 1)
        for y in (shifted, transposed):
            torch.testing.assert_close(decode(replace(call, y=y), "cuda").output, want.output, rtol=0, atol=0)


def test_one_block_alone(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products differ in their units, so that what one loads ahead lies where another's epilogue read."""
    for seed in range(12):
        emulated.seed_schedule(seed)
        with fixed(monkeypatch, "block", 1):
            check(step, preset("luong", "lstm", N=8, B=8, T=3, S=3, H=48, R=64))


@pytest.mark.parametrize("lost", ["mask", "carry", "d_weights", "cs"])
def test_a_planted_fault_is_found(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that the kernels are not given, or given as zeros."""
    started = host._run

    def without(made: Any, chosen: Any, x: Any, save: bool, named: Any) -> None:
        t = named.get(lost)
        other = None if t is None or lost in ("mask", "d_weights") else torch.zeros_like(t)
        started(made, chosen, x, save, named | {lost: other})

    case: Case = preset("luong", "lstm")
    monkeypatch.setattr(host, "_run", without)
    with fixed(monkeypatch, "cluster", 2), pytest.raises(Mismatch):
        check(step, case)


def test_a_group_that_waits_in_vain(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks leave, and the next call says so."""
    call = decoder_call(preset("luong", dropout=False))
    monkeypatch.setattr(native, "patience", lambda: 1000)
    monkeypatch.setattr(
        host, "_counters", lambda chosen, x: torch.full((chosen.shape.groups,), -1000, dtype=torch.int32)
    )
    with fixed(monkeypatch, "grid", 2):
        decode(call, "cuda")
        with pytest.raises(RuntimeError, match="gave up"):
            decode(call, "cuda")


def test_layouts_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As planned for an H200, without any other choice."""
    ran: list[Any] = []
    started = host._run
    monkeypatch.setattr(host, "_run", lambda made, chosen, *rest: (ran.append(chosen), started(made, chosen, *rest)))
    case = preset("joeynmt", "gru")
    check(step, case)
    call = decoder_call(case)
    todo = decoder_fused.make_plan(case.spec)
    assert todo.loop is not None
    assert host.layouts(todo.loop, decoder_fused.loop_tensors(call, todo, call.y)) == tuple(ran)


def test_names_of_tensors(emulated: Any) -> None:
    assert list(TENSORS) == emulated.decoder_tensors()
    assert native.emulates()
