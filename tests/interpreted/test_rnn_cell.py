"""One step on Triton, as cells and T=1 layers run it, against the float64 oracle; and modules that come down to it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastseq.kernels import cells, rnn, rnn_cell
from torch import Tensor, nn

import fastseq
from fastseq.backends import triton as backend
from tests.one_step import KINDS, cases, check_larger_tensors, check_nan, check_parts, ways
from tests.oracle import CELLS, Case, Layer, Mismatch, Problem, check_layer, check_second

WAYS = by_layer, by_cell = ways(backend)
SHAPES = [(0, 3, 5), (1, 1, 1), (3, 5, 15), (2, 16, 32), (17, 19, 33)]  # B, I, H


@pytest.fixture(autouse=True)
def no_layer(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """These calls take the shorter way: one launch, and no kernel of whole layers."""

    def refused(x: Tensor, what: Any) -> None:
        raise AssertionError("a kernel of whole layers")

    if "layer_kernels" not in request.keywords:
        monkeypatch.setattr(rnn, "run", refused)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_step_with_resets(cell: str, batch_first: bool) -> None:
    """Of one step they choose the initial state."""
    check_layer(by_layer, Problem.draw(Case(cell, T=1, I=3, H=15, batch_first=batch_first, resets=True)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_step(way: Layer, case: Case) -> None:
    """Outputs and every gradient."""
    check_layer(way, Problem.draw(case))


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


@pytest.mark.parametrize("field", ["forward", "backward", "HIDDEN", "INPUT"])
def test_fault_in_a_cell_is_noticed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails a wrong formula, and columns that change places."""
    cell = cells.CELLS["lstm"]
    wrong = {"forward": cells.gru, "backward": cells.gru_backward, "HIDDEN": (1, 0, 2, 3), "INPUT": (0, 1, 3, 2)}
    monkeypatch.setitem(rnn_cell.CELLS, "lstm", cell._replace(**{field: wrong[field]}))
    with pytest.raises(Mismatch):
        check_layer(by_cell, Problem.draw(Case("lstm", T=1, hx=True)))


def same(got: Any, expected: Any) -> None:
    """Nested tuples of tensors, within fp32's rounding."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    else:
        for one, other in zip(got, expected, strict=True):
            same(one, other)


@pytest.mark.layer_kernels
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("steps", [1, 3])
def test_modules(name: str, steps: int) -> None:
    """Two layers in both directions, padded, with lengths and packed, give what torch.nn's module gives."""
    module = getattr(fastseq, name)(4, 5, 2, bidirectional=True, backend="triton")
    stock = getattr(nn, name)(4, 5, 2, bidirectional=True)
    stock.load_state_dict(module.state_dict())
    x, lengths = torch.randn(steps, 3, 4), torch.tensor([steps, 1, steps])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    same(module(x), stock(x))
    same(module(packed)[0].data, stock(packed)[0].data)
    same(module(packed)[1], stock(packed)[1])
    same(module(x, lengths=lengths)[1], stock(packed)[1])
    same(module(x[:, 0])[0], stock(x[:, 0])[0])


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "LSTM", "GRU", "RNN"])
def test_modules_of_one_step(name: str) -> None:
    """Cells, and layers that are called with T=1."""
    module, stock = getattr(fastseq, name)(4, 5, backend="triton"), getattr(nn, name)(4, 5)
    stock.load_state_dict(module.state_dict())
    x = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(1, 3, 4)
    same(module(x), stock(x))
    state = stock(x)[1] if name in ("LSTM", "GRU", "RNN") else stock(x)
    same(module(x, state), stock(x, state))


@pytest.mark.layer_kernels
def test_encoder() -> None:
    """Its memory with lengths is that of the reference."""
    encoder = fastseq.Encoder(4, 5, 2, bidirectional=1, backend="triton")
    x, lengths = torch.randn(3, 4, 4), [4, 0, 2]
    got = encoder(x, lengths)
    for layer in encoder.layers:
        layer.backend = "reference"
    same((got.out, got.state), (lambda m: (m.out, m.state))(encoder(x, lengths)))


def test_what_is_refused() -> None:
    """With the reason."""
    projected = fastseq.LSTM(4, 5, proj_size=2)
    projected.backend = "triton"
    for module, x, reason in (
        (projected, torch.randn(2, 3, 4), "proj_size=2 is not fused"),
        (fastseq.GRU(4, 5, backend="triton").double(), torch.randn(2, 3, 4).double(), "take float32, bfloat16 and"),
        (fastseq.LSTMCell(4, 5, backend="triton").to("meta"), torch.randn(3, 4, device="meta"), "is on meta"),
    ):
        with pytest.raises(fastseq.InputError, match=reason):
            module(x)
