"""One step on CUDA, as cells and T=1 layers run it, against the float64 oracle; and modules that come down to it."""

import itertools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.backends import cuda as backend
from fastseq.backends.call import RnnCall
from fastseq.cuda import rnn
from tests.emulated import emulated
from tests.oracle import Case, Layer, Problem, check_layer, check_second, run

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated")


def by_layer(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """A layer of one step."""
    call = RnnCall(cell, x, h0, c0, weights, has_bias=len(weights) == 4, batch_first=rest[3])
    out, (h, *c) = backend.rnn(call)
    return out, h, c[0] if c else None


def by_cell(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """A cell, whose h is also the output."""
    x = x[:, 0] if rest[3] else x[0]
    h0, c0 = (None if s is None else s[0] for s in (h0, c0))
    h, *c = backend.rnn_cell(RnnCall(cell, x, h0, c0, weights, has_bias=len(weights) == 4))
    out = h.to(x.dtype)
    return out[:, None] if rest[3] else out[None], h[None], c[0][None] if c else None


WAYS = (by_layer, by_cell)
KINDS = list(itertools.product(("lstm", "gru"), (torch.float32, torch.bfloat16, torch.float16)))
SHAPES = [(0, 3, 5), (1, 1, 1), (3, 5, 15), (2, 16, 32), (17, 140, 33)]  # B, I, H


def cases() -> list[Case]:
    """Each shape with each cell and dtype; states, biases and layout take turns."""
    turns = itertools.cycle(itertools.product((True, False), repeat=3))
    return [Case(c, t, 1, *s, False, "full", *next(turns)) for s, (c, t) in itertools.product(SHAPES, KINDS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_step(way: Layer, case: Case) -> None:
    """Outputs and every gradient."""
    check_layer(way, Problem.draw(case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases()[6:12], ids=str)
def test_forward_is_one_launch(way: Layer, case: Case, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of whole layers, and none of PyTorch's: both products and the cell are in one."""
    launches = []
    monkeypatch.setattr(emulated, "rnn_step", lambda *args: launches.append(args))
    monkeypatch.setattr(rnn, "forward", None)
    monkeypatch.setattr(torch, "mm", None)
    problem = Problem.draw(case)
    with torch.no_grad():
        problem.call(way, problem.tensors)
    assert len(launches) == 1


ANY = [Case(cell, dtype, 1, 5, 7, 20) for cell, dtype in KINDS]
any_case = pytest.mark.parametrize("case", ANY, ids=str)
any_cell = pytest.mark.parametrize("case", [case for case in ANY if case.dtype == torch.float32], ids=str)


@pytest.mark.parametrize("way", WAYS)
@any_cell
def test_some_outputs_and_inputs_only(way: Layer, case: Case) -> None:
    """An undefined gradient stands for 0; what needs none is not computed, and the rest keeps its bits."""
    problem = Problem.draw(case)
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


@any_case
def test_fp32_state(case: Case) -> None:
    """It comes back in fp32, by the same short way."""
    check_layer(by_cell, Problem.draw(replace(case, state=torch.float32)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_second_derivatives(way: Layer, cell: str) -> None:
    """A step's backward, recorded, can be differentiated."""
    check_second(way, Problem.draw(Case(cell, T=1, B=3, I=2, H=9)))


@pytest.mark.parametrize("way", WAYS)
@any_cell
def test_rows_of_larger_tensors(way: Layer, case: Case) -> None:
    """Rows of x far apart and off every alignment: the bits of contiguous ones."""
    problem = Problem.draw(case)
    expected = run(way, problem)
    large = problem.tensors["x"].new_full([n + 3 for n in problem.tensors["x"].shape], torch.nan)
    problem.tensors["x"] = large[tuple(slice(1, n + 1) for n in problem.tensors["x"].shape)].copy_(problem.tensors["x"])
    for name, t in run(way, problem).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_modules(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, stacks and cells by `backend="cuda"`: what the reference gives, gradients too; explain says why."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    torch.manual_seed(1)
    layer, cell = getattr(fastseq, kind)(5, 12, 2, bidirectional=True), getattr(fastseq, kind + "Cell")(5, 12)
    x, lengths, resets = torch.randn(4, 3, 5), torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.3
    results = []
    for name in ("cuda", "reference"):
        layer.backend = cell.backend = name
        out, state = layer(x, lengths=lengths, resets=resets)
        step = cell(x[0])
        flat = [out, *(state if kind == "LSTM" else (state,)), *(step if kind == "LSTM" else (step,))]
        loss = sum(t.square().sum() for t in flat)
        parameters = [*layer.parameters(), *cell.parameters()]
        results.append([*flat, *torch.autograd.grad(loss, parameters)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    layer.backend = "cuda"
    told = fastseq.explain(layer, x)
    assert told.chosen == "cuda"
    assert "one block of 16 units" in str(told)


def test_what_does_not_fit_is_refused() -> None:
    """By name, before anything runs; `auto` goes elsewhere."""
    layer = fastseq.LSTM(4, 4096, dtype=torch.bfloat16, device="meta", backend="cuda")
    layer = layer.to_empty(device="cpu")
    with pytest.raises(fastseq.InputError, match=r"W_hh of hidden_size=4096 has 134\.2 MB"):
        layer(torch.zeros(2, 1, 4, dtype=torch.bfloat16))
    layer.backend = "auto"
    assert fastseq.explain(layer, torch.zeros(2, 1, 4, dtype=torch.bfloat16)).chosen == "cpu"
