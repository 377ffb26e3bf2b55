"""One step on Triton, as cells and T=1 layers run it, against the float64 oracle; and modules that come down to it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastseq.kernels import cells, rnn, rnn_cell
from torch import Tensor, nn

import fastseq
from fastseq.backends import triton as backend
from fastseq.backends.call import RnnCall
from tests.oracle import Case, Layer, Mismatch, Problem, check_layer, check_second, run


def by_layer(cell: str, x: Tensor, h0: Any, c0: Any, weights: list[Tensor], *rest: Any) -> Any:
    """A layer of one step."""
    resets, batch_first, bias = rest[1], rest[3], len(weights) == 4
    out, (h, *c) = backend.rnn(RnnCall(cell, x, h0, c0, weights, has_bias=bias, batch_first=batch_first, resets=resets))
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
SHAPES = [(0, 3, 5), (1, 1, 1), (3, 5, 15), (2, 16, 32), (17, 19, 33)]  # B, I, H


def cases() -> list[Case]:
    """Each shape with each cell and dtype; states, biases and layout take turns."""
    turns = itertools.cycle(itertools.product((True, False), repeat=3))
    return [Case(c, t, 1, *s, False, "full", *next(turns)) for s, (c, t) in itertools.product(SHAPES, KINDS)]


@pytest.fixture(autouse=True)
def no_layer(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """These calls take the shorter way: one launch, and no kernel of whole layers."""

    def refused(x: Tensor, what: Any) -> None:
        raise AssertionError("a kernel of whole layers")

    if "layer_kernels" not in request.keywords:
        monkeypatch.setattr(rnn, "run", refused)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_step_with_resets(cell: str, batch_first: bool) -> None:
    """Of one step they choose the initial state."""
    check_layer(by_layer, Problem.draw(Case(cell, T=1, I=3, H=15, batch_first=batch_first, resets=True)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases(), ids=str)
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


@pytest.mark.parametrize("way", WAYS)
@any_cell
def test_nan_stays_in_its_row(way: Layer, case: Case) -> None:
    """In outputs and input gradients."""
    problem = Problem.draw(case)
    clean, others = run(way, problem), torch.arange(case.B) != 2
    for name in ("x", "h0"):
        tensors = {n: t.clone() for n, t in problem.tensors.items()}
        tensors[name][0, 2] = torch.nan
        got = run(way, replace(problem, tensors=tensors))
        assert got["out"][0, 2].isnan().any()
        for n in {"out", "h_n", "c_n", "d_x", "d_h0", "d_c0"} & got.keys():
            assert torch.equal(got[n][0, others], clean[n][0, others]), n


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
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
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


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "LSTM", "GRU"])
def test_modules_of_one_step(name: str) -> None:
    """Cells, and layers that are called with T=1."""
    module, stock = getattr(fastseq, name)(4, 5, backend="triton"), getattr(nn, name)(4, 5)
    stock.load_state_dict(module.state_dict())
    x = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(1, 3, 4)
    same(module(x), stock(x))
    state = stock(x)[1] if name in ("LSTM", "GRU") else stock(x)
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
    for module, x, reason in (
        (fastseq.LSTM(4, 5, proj_size=2, backend="triton"), torch.randn(2, 3, 4), "proj_size=2 is not fused"),
        (fastseq.GRU(4, 5, backend="triton").double(), torch.randn(2, 3, 4).double(), "take float32, bfloat16 and"),
        (fastseq.LSTMCell(4, 5, backend="triton").to("meta"), torch.randn(3, 4, device="meta"), "is on meta"),
    ):
        with pytest.raises(fastseq.InputError, match=reason):
            module(x)
