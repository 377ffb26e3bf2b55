"""The layer-normalised Triton layer against its float64 oracle: every option, forward and every gradient."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import fastseq
from fastseq.ops.rnn_norm import rnn_norm_layer
from tests.norm_oracle import CELLS, NormProblem, check_norm, check_norm_second
from tests.oracle import Case, check_backward_changes_nothing, differentiate, run

layer = partial(rnn_norm_layer, on="triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = ("full", "lengths", "packed")


def cases() -> list[Case]:
    """Cells, dtypes and rows crossed; the other options take turns."""
    turns, found = itertools.cycle(itertools.product((True, False), repeat=5)), []
    kinds = [*itertools.product((FP32, BF16), ROWS), (FP16, "lengths")]
    for cell, (dtype, rows) in itertools.product(CELLS, kinds):
        two, hx, bias, batch_first, more = next(turns)
        for _ in range(6):  # 7 and 32 share no factor
            next(turns)
        batch_first, resets = batch_first and rows != "packed", more and rows != "packed"
        state = FP32 if hx and more else None
        found.append(Case(cell, dtype, 3, 5, 7, 13, two, rows, hx, bias, batch_first, state, resets=resets))
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_layer(case: Case) -> None:
    check_norm(layer, NormProblem.draw(case))


CORNERS = [(1, 3, 5, 16), (2, 17, 2, 32), (3, 1, 3, 17), (2, 2, 3, 2)]  # T, B, I, H


@pytest.mark.parametrize(("shape", "cell"), [*zip(CORNERS, CELLS * 2, strict=True)], ids=str)
def test_corner_shapes(cell: str, shape: tuple[int, int, int, int]) -> None:
    check_norm(
        layer, NormProblem.draw(Case(cell, FP32, *shape, rows="lengths" if shape[0] > 1 else "full", resets=True))
    )


ANY = [Case(cell, FP32, 3, 4, 3, 9, True, "lengths") for cell in CELLS]
any_case = pytest.mark.parametrize("case", ANY, ids=str)


@any_case
def test_second_derivatives(case: Case) -> None:
    check_norm_second(layer, NormProblem.draw(replace(case, H=4, T=2)))


@any_case
def test_backward_changes_nothing(case: Case) -> None:
    check_backward_changes_nothing(layer, NormProblem.draw(case))


@any_case
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",)], ids="+".join)
def test_gradients_of_some_outputs(case: Case, used: tuple[str, ...]) -> None:
    problem = NormProblem.draw(case)
    grads = {name: g for name, g in problem.grads.items() if name in used}
    check_norm(layer, replace(problem, grads=grads or problem.grads))  # a GRU has no c_n


@any_case
def test_gradients_of_some_inputs(case: Case) -> None:
    problem = NormProblem.draw(case)
    everything = run(layer, problem)
    for wanted in (["h0"], ["w_hh.0", "w_n_ih.1"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(layer, leaves)
        for name, d in differentiate(outputs, problem.grads, {n: leaves[n] for n in wanted}).items():
            assert torch.equal(d, everything[name]), name
    with torch.no_grad():
        for name, t in problem.call(layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_module(kind: str) -> None:
    """Layers upon layers; NaN stays in its row; no rows."""

    def build(hidden: int, **options: Any) -> Any:
        torch.manual_seed(0)
        return getattr(fastseq, kind)(5, hidden, 2, layer_norm=True, bidirectional=True, **options)

    x = torch.randn(4, 3, 5)
    module = build(8, backend="triton")
    torch.testing.assert_close(module(x)[0], build(8, backend="reference")(x)[0], rtol=1e-4, atol=1e-5)
    before, _ = module(x)
    x[1, 1] = torch.nan
    after, _ = module(x)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert after[:, 1].isnan().any()
    out, _ = module(x[:, :0])
    out.sum().backward()
    assert all(p.grad.eq(0).all() for p in module.parameters())
