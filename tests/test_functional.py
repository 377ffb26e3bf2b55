"""The functions agree with the modules, infer what the weights say, and have the GRU that resets before the product."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import functional as F
from tests.twins import BACKENDS, H, I, draw, flatten, twins

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]
PROJECTED = [{"proj_size": 3}, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}]
CASES = [("LSTM", o) for o in OPTIONS + PROJECTED] + [(kind, o) for kind in ("GRU", "RNN") for o in OPTIONS]
CASES += [("RNN", {"nonlinearity": "relu", **o}) for o in OPTIONS[:2]]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize("rows", ["padded", "unbatched", "unsorted"])
def test_layers_are_the_modules(kind: str, options: dict[str, object], rows: str) -> None:
    _, module = twins(kind, backend="reference", **options, dtype=torch.float64)
    x, hx = draw(module, rows, True)
    layout = {"batch_first": True} if module.batch_first and rows != "unsorted" else {}
    function = {"LSTM": F.lstm, "GRU": F.gru, "RNN": F.rnn}[kind]
    layout |= {"nonlinearity": module.nonlinearity} if kind == "RNN" else {}
    torch.manual_seed(4)
    got = function(
        x, hx, list(module.parameters()), bidirectional=module.bidirectional, dropout=module.dropout, training=True,
        backend="reference", **layout,
    )  # fmt: skip
    torch.manual_seed(4)
    expected = module(x, hx)
    assert type(got[0]) is type(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(flatten(got), flatten(expected), strict=True))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_the_modules(kind: str) -> None:
    for bias, hx, lead in product((True, False), (False, True), ((4,), ())):
        _, module = twins(kind, bias=bias)
        x, h = torch.randn(*lead, I), torch.randn(*lead, H)
        state = None if not hx else (h, -h) if kind == "LSTMCell" else h
        function = {"LSTMCell": F.lstm_cell, "GRUCell": F.gru_cell, "RNNCell": F.rnn_cell}[kind]
        got, expected = function(x, state, list(module.parameters())), module(x, state)
        assert all(torch.equal(a, b) for a, b in zip(flatten(got), flatten(expected), strict=True))


def cho(x: Tensor, h: Tensor, w: list[Tensor]) -> Tensor:
    """Cho et al. 2014, eq. 5 to 8, for one step and one matrix at a time."""
    (wr, wz, wn), (ur, uz, un) = w[0].chunk(3), w[1].chunk(3)
    (br, bz, bn), (cr, cz, cn) = (w[2].chunk(3), w[3].chunk(3)) if len(w) > 2 else ([0.0] * 3, [0.0] * 3)
    r = (x @ wr.T + br + h @ ur.T + cr).sigmoid()
    z = (x @ wz.T + bz + h @ uz.T + cz).sigmoid()
    return z * h + (1 - z) * (x @ wn.T + bn + (r * h) @ un.T + cn).tanh()


@pytest.mark.parametrize("bias", [True, False])
def test_gru_that_resets_before(bias: bool) -> None:
    weights = [p.detach().double() for p in nn.GRU(I, H, bias=bias).parameters()]
    x, h = torch.randn(4, 3, I).double(), torch.randn(1, 3, H).double()
    out, h_n = F.gru(x, h, weights, reset_after=False)
    state = h[0]
    for t in range(4):
        state = cho(x[t], state, weights)
        torch.testing.assert_close(out[t], state)
    assert torch.equal(h_n[0], out[-1])
    torch.testing.assert_close(F.gru_cell(x[0], h[0], weights, reset_after=False), out[0])
    with pytest.raises(fastseq.InputError, match="reset gate"):
        F.gru(x, h, weights, reset_after=False, backend="torch")


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_reference_has_a_second_derivative(cell: str) -> None:
    """First and second, by finite differences; lengths, both directions and a projection included."""
    lstm = cell == "lstm"
    stock = nn.LSTM(2, 3, bidirectional=True, proj_size=2) if lstm else nn.GRU(2, 3, bidirectional=True)
    weights = [p.detach().double().requires_grad_() for p in stock.parameters()]
    x = torch.randn(3, 2, 2).double().requires_grad_()
    h = torch.randn(2, 2, 2 if lstm else 3).double().requires_grad_()
    state = (h, torch.randn(2, 2, 3).double().requires_grad_()) if lstm else (h,)

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, w = rest[: len(state)], rest[len(state) :]
        options = {"lengths": [3, 1], "bidirectional": True, "backend": "reference"}
        if lstm:
            return tuple(flatten(F.lstm(x, hx, w, **options)))
        return tuple(flatten(F.gru(x, hx[0], w, reset_after=cell == "gru", **options)))

    assert torch.autograd.gradcheck(call, (x, *state, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *state, *weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_obeyed(backend: str) -> None:
    weights = list(nn.LSTM(I, H).parameters())
    out, (h, c) = F.lstm(torch.randn(3, 2, I), None, weights, backend=backend)
    assert (out.shape, h.shape, c.shape) == ((3, 2, H), (1, 2, H), (1, 2, H))


def test_structure_must_fit() -> None:
    weights = list(nn.LSTM(I, H).parameters())
    x = torch.zeros(3, 2, I)
    for given, message in (
        ([], "0 weights"),
        (weights[:1], "1 weights"),
        (weights[:3], "expected a multiple of 4"),
        ([*weights, weights[0]], "expected a multiple of 4"),
        ([weights[0], weights[1], None, None], "weights"),
    ):
        with pytest.raises((fastseq.InputError, TypeError), match=message):
            F.lstm(x, None, given)
    with pytest.raises(fastseq.InputError, match="a multiple of 4 per layer times 2"):
        F.lstm(x, None, weights, bidirectional=True)
    with pytest.raises(fastseq.InputError, match="3 weights; a cell takes"):
        F.lstm_cell(x[0], None, weights[:3])
    with pytest.raises(fastseq.InputError, match=r"bias_hh .* has shape \(6,\), expected \(24,\)"):
        F.lstm(x, None, [*weights[:3], torch.zeros(H)])
