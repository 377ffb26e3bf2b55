"""One step, as cells and T=1 layers run it on the cpu backend, against the float64 oracle."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import _native
from fastseq.backends import cpu
from fastseq.backends.call import RnnCall
from tests.oracle import CELLS, Case, Layer, Problem, cell_kinds, check_layer, check_second, run

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)


def by_layer(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """A layer of one step."""
    resets, batch_first, bias = rest[1], rest[3], len(weights) == 4
    out, (h, *c) = cpu.rnn(RnnCall(cell, x, h0, c0, weights, has_bias=bias, batch_first=batch_first, resets=resets))
    return out, h, c[0] if c else None


def by_cell(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """A cell, whose h is also the output."""
    x = x[:, 0] if rest[3] else x[0]
    h0, c0 = (None if s is None else s[0] for s in (h0, c0))
    h, *c = cpu.rnn_cell(RnnCall(cell, x, h0, c0, weights, has_bias=len(weights) == 4))
    return h[:, None] if rest[3] else h[None], h[None], c[0][None] if c else None


WAYS = (by_layer, by_cell)
KINDS = cell_kinds((torch.float32, torch.bfloat16))
SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (1, 64, 64),
    (3, 5, 15),
    (8, 17, 16),
    (17, 33, 31),
    (40, 30, 140),
    (65, 64, 65),
]  # B, I, H


def cases() -> list[Case]:
    """Each shape with each cell and dtype; states, biases, layout and threads take turns."""
    turns = itertools.cycle(itertools.product((True, False), (True, False), (False, True), (1, 2)))
    made = []
    for (cell, dtype), (B, I, H) in itertools.product(KINDS, SHAPES):  # noqa: E741
        for hx, bias, batch_first, threads in itertools.islice(turns, 5):  # 5 and 16 share no factor: all meet all
            made.append(Case(cell, dtype, 1, B, I, H, False, "full", hx, bias, batch_first, threads=threads))
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_step(way: Layer, case: Case) -> None:
    """Outputs and every gradient."""
    check_layer(way, Problem.draw(case))


RESETS = [
    Case(cell, dtype, 1, B, I, H, batch_first=batch_first, resets=True, threads=2)
    for (cell, dtype), (B, I, H), batch_first in itertools.product(KINDS, SHAPES[1::3], (False, True))  # noqa: E741
]


@pytest.mark.parametrize("case", RESETS, ids=str)
def test_step_with_resets(case: Case) -> None:
    """Of one step they choose the initial state, with the bits of a state that was zeroed beforehand."""
    problem = Problem.draw(case)
    check_layer(by_layer, problem)
    assert problem.resets is not None
    states = {
        n: problem.tensors[n].masked_fill(problem.resets.reshape(-1, 1), 0)
        for n in ("h0", "c0")
        if n in problem.tensors
    }
    zeroed = replace(problem, tensors=problem.tensors | states, resets=None)
    with torch.no_grad():
        for name, t in zeroed.call(by_layer, zeroed.tensors).items():
            assert torch.equal(problem.call(by_layer, problem.tensors)[name], t), name


ANY = [Case(cell, dtype, 1, 9, 7, 20) for cell, dtype in KINDS]
any_case = pytest.mark.parametrize("case", ANY, ids=str)


@pytest.mark.parametrize("way", WAYS)
@any_case
@pytest.mark.parametrize("used", ["out", "h_n", "c_n"])
def test_gradient_of_one_output(way: Layer, case: Case, used: str) -> None:
    """The others are undefined, which stands for 0."""
    problem = Problem.draw(case)
    if used in problem.grads:
        check_layer(way, replace(problem, grads={used: problem.grads[used]}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(way: Layer, cell: str) -> None:
    """A step's backward, recorded, can be differentiated."""
    check_second(way, Problem.draw(Case(cell, T=1, B=3, I=2, H=9)))


@pytest.mark.parametrize("way", WAYS)
@any_case
def test_strides_do_not_matter(way: Layer, case: Case) -> None:
    """Rows and features out of larger tensors, states and weights of any strides: the bits of contiguous ones."""
    problem = Problem.draw(case)
    expected = run(way, problem)

    def inside(t: Tensor, step: int) -> Tensor:
        large = t.new_full([3 + n * step for n in t.shape], torch.nan)
        return large[tuple(slice(3, 3 + n * step, step) for n in t.shape)].copy_(t)

    for step in (1, 2):
        leaves = {n: inside(t, step).requires_grad_() for n, t in problem.tensors.items()}
        outputs = problem.call(way, leaves)
        for n, t in outputs.items():
            assert torch.equal(t, expected[n]), n
        grads = [inside(problem.grads[n], step) for n in outputs]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
        for n, d in zip(leaves, found, strict=True):
            assert torch.equal(d, expected[f"d_{n}"]), n


@pytest.mark.parametrize("way", WAYS)
@any_case
def test_nan_stays_in_its_row(way: Layer, case: Case) -> None:
    """In outputs and input gradients."""
    problem = Problem.draw(case)
    clean = run(way, problem)
    others = torch.arange(case.B) != 4
    for name in ("x", "h0"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[name][0, 4] = torch.nan
        got = run(way, replace(problem, tensors=tensors))
        assert got["out"][0, 4].isnan().any()
        for n in {"out", "h_n", "c_n", "d_x", "d_h0", "d_c0"} & got.keys():
            assert torch.equal(got[n][0, others], clean[n][0, others]), n


@pytest.mark.parametrize("way", WAYS)
def test_state_is_not_overwritten(way: Layer) -> None:
    """A generation loop may keep every step's state."""
    problem = Problem.draw(Case("lstm", T=1))
    before = {n: t.clone() for n, t in problem.tensors.items()}
    with torch.no_grad():
        outputs = problem.call(way, problem.tensors)
    for n, t in before.items():
        assert torch.equal(problem.tensors[n], t), n
    assert outputs["h_n"].data_ptr() != problem.tensors["h0"].data_ptr()
