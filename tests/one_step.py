"""One step of a GPU's backend, as cells and T=1 layers run it, for the tests of each of them."""

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastseq.backends.call import RnnCall
from tests.oracle import Case, Layer, Problem, cell_kinds, check_layer, run

__all__ = ["KINDS", "cases", "check_larger_tensors", "check_nan", "check_parts", "ways"]

KINDS = cell_kinds((torch.float32, torch.bfloat16, torch.float16))


def ways(backend: ModuleType) -> tuple[Layer, Layer]:
    """By a layer of one step, and by a cell, whose h is also the output."""

    def by_layer(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
        call = RnnCall(
            cell, x, h0, c0, weights, has_bias=len(weights) == 4, batch_first=rest[3], resets=rest[1]
        )  # fmt: skip
        out, (h, *c) = backend.rnn(call)
        return out, h, c[0] if c else None

    def by_cell(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
        x = x[:, 0] if rest[3] else x[0]
        h0, c0 = (None if s is None else s[0] for s in (h0, c0))
        h, *c = backend.rnn_cell(RnnCall(cell, x, h0, c0, weights, has_bias=len(weights) == 4))
        out = h.to(x.dtype)
        return out[:, None] if rest[3] else out[None], h[None], c[0][None] if c else None

    return by_layer, by_cell


def cases(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Each shape (B, I, H) with each cell and dtype; states, biases and layout take turns.

    But for one unit by itself of rnn_tanh: it is drawn so near to 1 that 1 - h^2 loses more than the budget knows of.
    """
    turns = itertools.cycle(itertools.product((True, False), repeat=3))
    every = [Case(c, t, 1, *s, False, "full", *next(turns)) for s, (c, t) in itertools.product(shapes, KINDS)]
    return [case for case in every if (case.cell, case.H) != ("rnn_tanh", 1)]


def check_parts(way: Layer, problem: Problem) -> None:
    """An undefined gradient stands for 0; what needs none is not computed, and the rest keeps its bits."""
    for used in ("out", "h_n", "c_n"):
        if used in problem.grads:
            check_layer(way, replace(problem, grads={used: problem.grads[used]}))
    everything = run(way, problem)
    for wanted in (["x"], ["h0"], ["w_hh.0"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(way, leaves)
        grads = [problem.grads[n] for n in outputs]
        found = torch.autograd.grad(list(outputs.values()), [leaves[n] for n in wanted], grads)
        for name, d in zip(wanted, found, strict=True):
            assert torch.equal(d, everything[f"d_{name}"]), name


def check_larger_tensors(way: Layer, problem: Problem) -> None:
    """Rows of x far apart and off every alignment: the bits of contiguous ones."""
    expected = run(way, problem)

    def inside(t: Tensor) -> Tensor:
        large = t.new_full([n + 3 for n in t.shape], torch.nan)
        return large[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)

    problem.tensors["x"] = inside(problem.tensors["x"])
    leaves = {n: t.requires_grad_() for n, t in problem.tensors.items()}
    outputs = problem.call(way, leaves)
    found = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), [inside(problem.grads[n]) for n in outputs]
    )
    for name, t in [*outputs.items(), *zip([f"d_{n}" for n in leaves], found, strict=True)]:
        assert torch.equal(t, expected[name]), name


def check_nan(way: Layer, problem: Problem) -> None:
    """In outputs and input gradients it stays in its row."""
    clean, others = run(way, problem), torch.arange(problem.case.B) != 2
    for name in ("x", "h0"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[name][0, 2] = torch.nan
        got = run(way, replace(problem, tensors=tensors))
        assert got["out"][0, 2].isnan().any()
        for n in {"out", "h_n", "c_n", "d_x", "d_h0", "d_c0"} & got.keys():
            assert torch.equal(got[n][0, others], clean[n][0, others]), n
