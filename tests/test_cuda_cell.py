"""One step on CUDA, as cells and T=1 layers run it, against the float64 oracle; and modules that come down to it."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

import fastseq
from fastseq.backends import cuda as backend
from fastseq.cuda import rnn
from tests.emulated import emulated
from tests.one_step import KINDS, cases, check_larger_tensors, check_nan, check_parts, ways
from tests.oracle import CELLS, Case, Layer, Problem, check_layer, check_second

__all__ = ["emulated"]
pytestmark = pytest.mark.usefixtures("emulated")


WAYS = by_layer, by_cell = ways(backend)
SHAPES = [(0, 3, 5), (1, 1, 1), (3, 5, 15), (2, 16, 32), (17, 140, 33)]  # B, I, H


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_step(way: Layer, case: Case) -> None:
    """Outputs and every gradient."""
    check_layer(way, Problem.draw(case))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(SHAPES[1:2]), ids=str)
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
    check_parts(way, Problem.draw(case))


@any_case
def test_fp32_state(case: Case) -> None:
    """It comes back in fp32, by the same short way."""
    check_layer(by_cell, Problem.draw(replace(case, state=torch.float32)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(way: Layer, cell: str) -> None:
    """A step's backward, recorded, can be differentiated."""
    check_second(way, Problem.draw(Case(cell, T=1, B=3, I=2, H=9)))


@pytest.mark.parametrize("way", WAYS)
@any_cell
def test_rows_of_larger_tensors(way: Layer, case: Case) -> None:
    """Rows of x far apart and off every alignment: the bits of contiguous ones."""
    check_larger_tensors(way, Problem.draw(case))


@pytest.mark.parametrize("way", WAYS)
@any_cell
def test_nan_stays_in_its_row(way: Layer, case: Case) -> None:
    """In outputs and input gradients."""
    check_nan(way, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_step_with_resets(cell: str, batch_first: bool) -> None:
    """Of one step they choose the initial state."""
    check_layer(by_layer, Problem.draw(Case(cell, T=1, I=3, H=15, batch_first=batch_first, resets=True)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
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
