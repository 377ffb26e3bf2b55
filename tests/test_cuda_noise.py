"""Zoneout, dropout within the recurrence and every cell state on the CUDA kernels, emulated, against the oracle."""

import itertools
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.ops import rnn as ops
from tests.emulated import chosen, emulated
from tests.oracle import (
    CELLS,
    GATES,
    SMOOTH,
    Case,
    Mismatch,
    Problem,
    check_backward_changes_nothing,
    check_layer,
    check_second,
    run,
)

__all__ = ["emulated"]

layer = partial(ops.rnn_layer, on="cuda")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DESIGNS = {"block": 33, "cluster": 40, "grid": 40}  # and hidden units for it: no multiple of a tile
SCHEDULES = (0, 1, 2, 4, 6, 8)  # seeds: 0 in order, even ones starve somebody
SEGMENTS = [("full", False), ("full", True), ("lengths", False), ("lengths", True), ("packed", False)]  # and resets
every_design = pytest.mark.parametrize("design", DESIGNS)


@pytest.fixture(autouse=True)
def full_fp32(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers follow cuDNN's flag, whose default is TF32: the oracle of fp32 does not allow for its rounding."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


def kinds_of_noise(cell: str) -> list[str]:
    """Those that do something; "" is every cell state alone."""
    kinds = ["zoneout", "mean", "state", "both"]
    return kinds + ["update"] * (GATES[cell] > 1) + [""] * (cell == "lstm")


KINDS = [(cell, noise, rows) for cell in CELLS for noise in kinds_of_noise(cell) for rows in SEGMENTS]


@every_design
@pytest.mark.parametrize("number", range(len(KINDS)), ids=lambda n: "-".join(map(str, KINDS[n])))
def test_every_kind(design: str, number: int, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, noise, rows and designs crossed, each on another layout and schedule; the other options take turns."""
    cell, noise, (rows, resets) = KINDS[number]
    turn = number + list(DESIGNS).index(design)
    dtype = (FP32, BF16, FP16)[turn % 3] if cell in SMOOTH else FP32
    two, hx, batch_first = ((turn >> i) & 1 == 0 for i in range(3))
    states = cell == "lstm" and (not noise or turn % 4 != 3)
    case = Case(
        cell, dtype, 3, (1, 5, 9, 17)[turn % 4], 4, DESIGNS[design], two, rows, hx, True,
        batch_first and rows != "packed", resets=resets, noise=noise, states=states,
    )  # fmt: skip
    emulated.seed_schedule(SCHEDULES[number % len(SCHEDULES)])
    with chosen(monkeypatch, design, number) as ran:
        check_layer(layer, Problem.draw(case))
    assert len(ran) == 2


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_weights_in_registers(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that keep some, which have few registers left."""
    case = Case(cell, dtype, 2, 9, 4, 250, False, "lengths", noise="both", states=True)
    with chosen(monkeypatch, "cluster", 1, kept=True) as ran:
        check_layer(layer, Problem.draw(case))
    assert all(p.shape.kept for p in ran)


@pytest.mark.parametrize("design", ["cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_schedules_do_not_matter(design: str, cell: str, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread runs first, the bits are the same."""
    case = Case(cell, BF16, 3, 9, 4, 40, True, "lengths", state=FP32, resets=True, noise="both", states=True)
    problem, every = Problem.draw(case), []
    for seed in SCHEDULES:
        emulated.seed_schedule(seed)
        with chosen(monkeypatch, design, 5):
            every.append(run(layer, problem))
    for other in every[1:]:
        for name, t in other.items():
            assert torch.equal(t, every[0][name]), name


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 5, 16), (3, 0, 3, 5), (5, 17, 3, 15), (2, 2, 4, 64)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_corner_shapes(shape: tuple[int, int, int, int], cell: str) -> None:
    """Shapes at and beside the edges of tiles, one step and no rows, as `plan` lays them out."""
    check_layer(layer, Problem.draw(Case(cell, FP32, *shape, True, noise="both", states=True)))


@every_design
@pytest.mark.parametrize("used", [("out",), ("h_n",), ("c_n",), ("c_out",), ("c_out", "h_n")], ids="+".join)
def test_gradients_of_some_outputs(design: str, used: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' are undefined, which stands for 0; a state in fp32 beside bf16."""
    case = Case("lstm", BF16, 3, 5, 4, DESIGNS[design], True, "lengths", state=FP32, noise="both", states=True)
    problem = Problem.draw(case)
    with chosen(monkeypatch, design, 2):
        check_layer(layer, replace(problem, grads={name: problem.grads[name] for name in used}))


SMALL = [
    Case(cell, T=3, B=3, I=2, H=9, rows=rows, bidirectional=True, noise="both", states=True, resets=rows == "lengths")
    for cell, rows in itertools.product(CELLS, ("lengths", "packed"))
]
small_case = pytest.mark.parametrize("case", SMALL, ids=str)


@small_case
def test_second_derivatives(case: Case) -> None:
    check_second(layer, Problem.draw(case))


@small_case
def test_backward_changes_nothing(case: Case) -> None:
    check_backward_changes_nothing(layer, Problem.draw(case))


@pytest.mark.parametrize("cell", CELLS)
def test_rates_without_effect(cell: str) -> None:
    """A mask goes before its rate, and nothing is scaled where nothing is dropped: as on every other backend."""
    problem = Problem.draw(Case(cell, T=3, B=3, I=2, H=9, noise="zoneout"))
    masks = problem.extras._replace(rates=(1.5, 0.25, 0.125))
    check_layer(layer, replace(problem, extras=masks))


FAULTS = ("hold_h", "hold_c", "update", "recurrent", "rates", "directions")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    """The oracle fails a layer that leaves a mask out, or confuses the directions'."""
    noise = {"update": "update", "rates": "mean"}.get(fault, "both")
    problem = Problem.draw(Case("lstm", T=3, B=5, I=4, H=20, bidirectional=True, noise=noise))

    def faulty(*args: Any) -> Any:
        *rest, extras = args
        if fault == "rates":
            extras = extras._replace(rates=(1.0, 0.0, 0.0))
        elif fault == "directions":
            extras = extras._replace(recurrent=extras.recurrent.flip(0))
        else:
            extras = extras._replace(**{fault: None})
        return layer(*rest, extras)

    with pytest.raises(Mismatch):
        check_layer(faulty, problem)


def test_operators_agree_with_their_schemas() -> None:
    """With masks, and every cell state."""
    problem = Problem.draw(Case(T=3, B=3, I=4, bidirectional=True, noise="both", states=True))
    t, e = problem.tensors, problem.extras
    weights = [w for n, w in t.items() if n[:2] in ("w_", "b_")]
    call = ("lstm", t["x"], t["h0"], t["c0"], weights, None, None, None, False, True)
    noise = (e.masks, list(e.rates))
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.fastseq.rnn_forward.default, torch.ops.fastseq.rnn_backward.default
    torch.library.opcheck(forward, (*call, True, *noise, True), {"on": "cuda"}, test_utils=checks)
    out, _, _, c_out, gates, cells = forward(*call, True, *noise, True, on="cuda")
    expected = layer(*call, e)
    assert torch.equal(out, expected[0])
    assert torch.equal(c_out, expected[3])
    grads = [problem.grads[name] for name in ("out", "h_n", "c_n", "c_out")]
    inputs = ("lstm", *grads, *call[1:], out, gates, cells, [True] * 4, *noise)
    torch.library.opcheck(backward, inputs, {"on": "cuda"}, test_utils=checks)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"zoneout": (0.1, 0.5), "recurrent_dropout": 0.4}),
    ("LSTM", {"recurrent_dropout": 0.4, "recurrent_dropout_on": "update", "learn_state": True}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.4, "recurrent_dropout_on": "update"}),
    ("RNN", {"zoneout": 0.3, "recurrent_dropout": 0.4}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_modules(kind: str, options: dict[str, Any], training: bool, steps: int) -> None:
    """`backend="cuda"` runs what the reference runs, mask for mask; one step too."""
    x, results = torch.randn(steps, 3, 5), []
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        module = getattr(fastseq, kind)(5, 8, 2, bidirectional=True, backend=backend, **options).train(training)
        assert fastseq.explain(module, x).chosen == backend
        torch.manual_seed(5)
        out, state = module(x)
        states = state if isinstance(state, tuple) else (state,)
        loss = out.sin().sum() + sum(s.cos().sum() for s in states)
        results.append([out, *states, *torch.autograd.grad(loss, list(module.parameters()))])
    close(*results)


@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
def test_forward_states(lengths: list[int] | None) -> None:
    """c of every step of the last layer, and its gradient."""
    x, results = torch.randn(4, 3, 5), []
    for backend in ("cuda", "reference"):
        torch.manual_seed(0)
        module = fastseq.LSTM(5, 8, 2, bidirectional=True, backend=backend)
        out, (h, c), cells = module.forward_states(x, lengths=lengths)
        loss = cells.sin().sum() + out.cos().sum()
        results.append([out, h, c, cells, *torch.autograd.grad(loss, list(module.parameters()))])
    close(*results)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of fp32 in another order
