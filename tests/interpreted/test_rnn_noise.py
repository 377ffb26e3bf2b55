"""The Triton layer under zoneout and dropout within the recurrence, and the gradient of every cell state."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels import rnn_cell, rnn_noise, rnn_sequence, rnn_steps
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.ops import rnn as ops
from fastseq.ops.extras import Extras
from tests.oracle import (
    CELLS,
    SMOOTH,
    Case,
    Mismatch,
    Problem,
    check_backward_changes_nothing,
    check_layer,
    check_second,
    differentiate,
    run,
)

layer = partial(ops.rnn_layer, on="triton")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HIDDEN = {"sequence": 13, "steps": 19, "barrier": 19}  # of `way`: one block of units, or two
both = pytest.mark.parametrize("way", ["sequence", "steps"], indirect=True)


def kinds() -> list[tuple[str, str]]:
    """Each cell with each kind of noise that it has; "": every cell state alone."""
    of_all = [(cell, noise) for cell in CELLS for noise in ("zoneout", "mean", "state", "both")]
    return [*of_all, ("lstm", "update"), ("gru", "update"), ("lstm", "")]


def cases() -> list[tuple[str, Case]]:
    """Each of them twice on one kernel, once on the other; rows and the other options take turns."""
    turns = itertools.cycle(itertools.product((True, False), repeat=4))
    rows = itertools.cycle((("full", False), ("lengths", True), ("packed", False), ("lengths", False), ("full", True)))
    found = []
    for way, times in (("sequence", 2), ("steps", 1)):
        for (cell, noise), _ in itertools.product(kinds(), range(times)):
            two, hx, bias, states = next(turns)
            kind, resets = next(rows)
            states, batch_first = states or not noise, bias and kind != "packed"
            found.append((way, Case(cell, FP32, 3, 4, 3, HIDDEN[way], two, kind, hx, bias, batch_first, resets=resets,
                                    noise=noise, states=states)))  # fmt: skip
            next(turns)
            next(turns)  # 3 and 16 share no factor: all meet all
    for cell, dtype, noise in itertools.product(SMOOTH, (BF16, FP16), ("both", "mean")):
        way = "steps" if (cell == "lstm") == (dtype == BF16) else "sequence"
        found.append((way, Case(cell, dtype, 3, 4, 3, HIDDEN[way], True, "lengths", noise=noise, states=True)))
    ragged = Case("lstm", FP32, 3, 4, 3, HIDDEN["barrier"], True, "lengths", resets=True, noise="both", states=True)
    return found + [("barrier", replace(ragged, cell=cell)) for cell in CELLS]


@pytest.mark.parametrize(("way", "case"), cases(), indirect=["way"], ids=str)
def test_every_kind(way: str, case: Case) -> None:
    """Outputs and every gradient against the oracle."""
    check_layer(layer, Problem.draw(case))


SHAPES = [  # T, B, I, H
    (1, 3, 5, 16),  # one step
    (3, 0, 3, 5),  # no rows
    (2, 17, 3, 15),  # more rows than a block
    (2, 2, 13, 33),  # three blocks of units, one unit in the last
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_corner_shapes(cell: str, shape: tuple[int, int, int, int]) -> None:
    check_layer(layer, Problem.draw(Case(cell, FP32, *shape, True, noise="both", states=True)))


@both
@pytest.mark.parametrize(("noise", "used"), [("", "c_out"), ("both", "c_out"), ("both", "h_n"), ("", "c_out c_n")])
def test_gradients_of_some_outputs_only(way: str, noise: str, used: str) -> None:
    """The others' are None, which stands for 0; a state in fp32 beside bf16."""
    case = Case("lstm", BF16, 2, 4, 3, HIDDEN[way], True, "lengths", state=FP32, noise=noise, states=True)
    problem = Problem.draw(case)
    check_layer(layer, replace(problem, grads={name: problem.grads[name] for name in used.split()}))


@pytest.mark.parametrize(
    ("way", "cell"), [("sequence", "lstm"), ("sequence", "gru"), ("steps", "lstm")], indirect=["way"]
)
def test_gradients_of_some_inputs_only(way: str, cell: str) -> None:
    """What needs no gradient is not computed, and the rest keeps its bits; so do outputs without any gradient."""
    problem = Problem.draw(Case(cell, FP32, 2, 3, 3, HIDDEN[way], True, "lengths", noise="both", states=True))
    everything = run(layer, problem)
    for wanted in (["x"], ["h0"], ["w_hh.0", "b_ih.1"]):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        outputs = problem.call(layer, leaves)
        for name, d in differentiate(outputs, problem.grads, {n: leaves[n] for n in wanted}).items():
            assert torch.equal(d, everything[name]), (wanted, name)
    with torch.no_grad():
        for name, t in problem.call(layer, problem.tensors).items():
            assert torch.equal(t, everything[name]), name


@both
def test_what_is_held_keeps_its_bits(way: str) -> None:
    """Where zoneout holds a unit, neither the state of fp32 beside bf16 nor what comes out is rounded anew."""
    case = Case("lstm", BF16, 2, 9, 3, HIDDEN[way], True, state=FP32, noise="zoneout", states=True)
    problem = Problem.draw(case)
    hold_h, hold_c = problem.extras.hold_h, problem.extras.hold_c
    assert hold_h is not None
    assert hold_c is not None
    found = run(layer, problem)
    forwards = slice(None, case.H)
    for name, hold in (("out", hold_h), ("c_out", hold_c)):
        steps, held = found[name][..., forwards], hold[1:, :, forwards]
        assert torch.equal(steps[1:][held], steps[:-1][held]), name
    for name, hold in (("h", hold_h), ("c", hold_c)):
        always = hold[:, :, forwards].all(0)
        assert always.any()
        assert torch.equal(found[f"{name}_n"][0][always], problem.tensors[f"{name}0"][0][always])


@both
def test_backward_changes_nothing(way: str) -> None:
    case = Case("lstm", FP32, 2, 3, 3, HIDDEN[way], True, "packed", noise="both", states=True)
    check_backward_changes_nothing(layer, Problem.draw(case))


def test_second_derivatives() -> None:
    check_second(layer, Problem.draw(Case("lstm", T=2, B=3, I=2, H=9, rows="lengths", noise="both", states=True)))


@pytest.mark.parametrize("rows", ["padded", "lengths", "packed", "one step"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_modules_draw_what_the_reference_draws(kind: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask for mask, through several layers. One step goes the layer's way: its own kernel has no masks."""
    for way in ("forward", "backward"):
        monkeypatch.setattr(rnn_cell, way, None)
    options: dict[str, Any] = {"zoneout": (0.2, 0.4) if kind == "LSTM" else 0.3, "recurrent_dropout": 0.4}
    if kind == "GRU":
        options["recurrent_dropout_on"] = "update"
    x: Any = torch.randn(1 if rows == "one step" else 4, 3, 5)
    given = {"lengths": [4, 0, 3]} if rows == "lengths" else {}
    if rows == "packed":
        x = pack_padded_sequence(x, [2, 4, 3], enforce_sorted=False)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        module = getattr(fastseq, kind)(5, 9, 2, bidirectional=True, backend=backend, **options)
        out, state = module(x, **given)
        out = out.data if rows == "packed" else out
        grads = torch.autograd.grad(out.sin().sum(), list(module.parameters()))
        results.append([out, *(state if kind == "LSTM" else (state,)), *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # sums of fp32 in another order


@triton.jit
def nothing_kept(CELL: tl.constexpr, CELL_STATE: tl.constexpr, saved, before, after, dh, carry, masks, at, there):
    """Backward forgets what does not go through the gates."""
    d_pre, carry, kept = rnn_noise.masked_backward(
        CELL, CELL_STATE, saved, before, after, dh, carry, masks, at, there
    )  # fmt: skip
    return d_pre, carry, kept * 0


def what_h_keeps_c_keeps(masks: rnn_noise.Masks) -> rnn_noise.Masks:
    return masks._replace(hold_c=masks.hold_h)


def nothing_dropped(masks: rnn_noise.Masks) -> rnn_noise.Masks:
    return masks._replace(update=None, scale=None)


@both
@pytest.mark.parametrize("fault", [what_h_keeps_c_keeps, nothing_dropped, nothing_kept], ids=lambda f: f.__name__)
def test_fault_is_noticed(way: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails kernels that mistake one mask for another, or lose a path of the gradient."""
    problem = Problem.draw(Case("lstm", FP32, 2, 3, 3, HIDDEN[way], noise="both", states=True))
    check_layer(layer, problem)
    if fault is nothing_kept:
        for module in (rnn_sequence, rnn_steps):
            monkeypatch.setitem(module.backward_kernel.fn.__globals__, "masked_backward", fault)
    else:
        of = rnn_noise.Masks.of
        monkeypatch.setattr(rnn_noise.Masks, "of", lambda extras: fault(of(extras)))
    with pytest.raises(Mismatch):
        check_layer(layer, problem)


def test_what_does_nothing_is_no_argument() -> None:
    """Then the kernels are those of a plain call; rates are numbers of the run, never whole ones."""
    mask = torch.zeros(3, dtype=torch.uint8)
    assert rnn_noise.Masks.of(Extras(recurrent=mask)) is None
    assert rnn_noise.Masks.of(Extras(rates=(2.0, 0.0, 0.0))) is None
    of_c = rnn_noise.Masks.of(Extras(update=mask, rates=(2, 0, 1)))
    assert of_c is not None
    assert of_c == (mask, 2.0, None, None, None, 1.0)
    assert not of_c.of_h
    assert [type(number) for number in (of_c.scale, of_c.share_c)] == [float, float]
