"""The reference decoder is right: every DecoderSpec against the suite's plain loops, and by finite differences."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastseq
from fastseq.spec import AttentionParams, DecoderSpec, Keys
from tests.decoder_oracle import PRESETS, AttentionCase, Case, Problem, budget, check, fast, plain, preset, run
from tests.oracle import Mismatch, Results, compare

REFERENCE = fast("reference")
SCORES = ("additive", "dot", "bare", "projected")
FIELDS: dict[str, tuple[Any, ...]] = {
    "cell": ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"),
    "num_layers": (1, 1, 2, 3),
    "attention": (True, True, True, False),
    "attend": ("before", "after", "between"),
    "query": ("state", "state", "feed"),
    "query_layer": (-1, 0, 1),
    "context_to": ("none", "first", "upper", "all"),
    "context_side": ("input", "input", "hidden"),
    "feed": (None, "context", "output"),
    "readout": (("state",), ("context", "state"), ("prev_state", "input", "context"), ("input", "state", "state")),
    "combine": (None, "tanh", "linear", "maxout"),
    "residual": (None, None, 1, 2),
    "window": (None, None, 2),
}


def any_case(seed: int) -> Case:
    """A decoder with random options and sizes."""
    r = random.Random(seed)
    while True:
        options = {name: r.choice(values) for name, values in FIELDS.items()}
        try:
            spec = DecoderSpec(**options)
        except fastseq.InputError:
            continue
        rows = r.choice((1, 2, 3))
        return Case(
            name=f"any{seed}", spec=spec, score=r.choice(SCORES), window=spec.window, N=rows * r.choice((1, 2)), B=rows,
            T=r.choice((1, 3)), S=r.choice((1, 5, 8)), H=r.choice((5, 8)), A=6, D=r.choice((4, 9)), I=3, R=8,
            mask=r.choice(("none", "prefix", "holes")), bias=r.random() < 0.5, dropout=r.random() < 0.5,
            weights=r.random() < 0.5, seed=seed,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(120))
def test_every_spec(seed: int) -> None:
    check(REFERENCE, any_case(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    check(REFERENCE, preset(name, dtype=dtype))
    if dtype != torch.float64:
        check(REFERENCE, preset(name, dtype=dtype, state=torch.float32))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("mask", ["none", "prefix", "holes"])
def test_attention_of_all_queries_at_once(score: str, window: int | None, mask: str) -> None:
    check(REFERENCE, AttentionCase(score, window, mask=mask))
    if window is None:
        check(REFERENCE, AttentionCase(score, mask=mask, dtype=torch.bfloat16))


def small(name: str, cell: str, **changes: Any) -> Case:
    """A case small enough for finite differences."""
    sizes = {"N": 2, "B": 2, "T": 2, "S": 3, "A": 2, "D": 2, "I": 2, "H": 2, "R": 2, "dtype": torch.float64}
    return preset(name, cell, **(sizes | changes))


def check_numerically(problem: Problem) -> None:
    """First and second derivatives of every output by every input, by finite differences."""
    names, inputs = list(problem.tensors), [t.nan_to_num().requires_grad_() for t in problem.tensors.values()]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(REFERENCE(problem, dict(zip(names, values, strict=True))).values())

    assert gradcheck(outputs, inputs)
    assert gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", PRESETS)
def test_derivatives_by_finite_differences(name: str, cell: str) -> None:
    score = {"luong": "dot", "tf_nmt": "bare", "joeynmt": "projected"}.get(name, "additive")
    layers = {"num_layers": 2, "residual": 1} if name == "gnmt" else {}
    check_numerically(Problem.draw(small(name, cell, score=score, dropout=name == "luong", **layers)))


def test_derivatives_of_the_window_by_finite_differences() -> None:
    check_numerically(Problem.draw(replace(small("bahdanau", "gru_reset_before", window=1), S=4)))


def test_weights_alone_have_gradients() -> None:
    """A loss of nothing but weights reaches query, keys and parameters."""
    problem = Problem.draw(AttentionCase())
    truth = {n: t.double().requires_grad_() for n, t in problem.tensors.items()}
    low = {n: t.clone().requires_grad_() for n, t in problem.tensors.items()}
    results: list[Results] = []
    for step, leaves in ((plain, truth), (REFERENCE, low)):
        loss = (step(problem, leaves)["weights"] * problem.grads["weights"]).sum()
        names = [n for n in leaves if n != "memory"]
        results.append(dict(zip(names, torch.autograd.grad(loss, [leaves[n] for n in names]), strict=True)))
    for name, exact in results[0].items():
        assert exact.abs().max() > 0.01
        torch.testing.assert_close(results[1][name].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("sutskever", "cho")])
def test_no_source_at_all(name: str) -> None:
    """S = 0, and rows without an attended position: zero context, as a decoder whose context is zero."""
    check(REFERENCE, preset(name, S=0, mask="none"))
    check(REFERENCE, preset(name, S=0))
    problem = Problem.draw(preset(name, mask="none", dropout=False))
    problem.mask = torch.zeros(problem.case.B, problem.case.S, dtype=torch.bool)
    none = run(
        REFERENCE, replace(problem, tensors={**problem.tensors, "memory": problem.tensors["memory"] * torch.nan})
    )
    assert all(t.isfinite().all() for t in none.values())
    for gone in ("weights", "d_keys", "d_memory", "d_w_query", "d_w_v"):
        assert not none[gone].count_nonzero()
    problem.mask = None
    still = run(REFERENCE, replace(problem, tensors={**problem.tensors, "memory": problem.tensors["memory"] * 0}))
    torch.testing.assert_close(none["out"], still["out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores as large as the dtype allows beside masked ones: the largest takes all."""
    keys = torch.tensor([[[250.0], [-250.0], [torch.nan]]], dtype=dtype)
    mask = torch.tensor([[True, True, False]])
    memory = torch.tensor([[[1.0], [2.0], [torch.inf]]], dtype=dtype)
    query = torch.tensor([[250.0], [-250.0]], dtype=dtype)
    context, weights = fastseq.functional.attention(
        query[None], Keys(keys, memory, mask), AttentionParams(), need_weights=True, backend="reference"
    )
    assert weights is not None
    assert weights.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    assert context.tolist() == [[[1], [2]]]


@pytest.mark.parametrize("name", PRESETS)
def test_any_device(name: str) -> None:
    """Nothing is made on another device than the input's: on "meta", which has no values, the shapes come out."""
    case = preset(name, **{"window": 2} if name == "luong" else {})
    problem = Problem.draw(case)
    expected = REFERENCE(problem, problem.tensors)
    problem.mask = None if problem.mask is None else problem.mask.to("meta")
    problem.masks = problem.masks._make(None if m is None else m.to("meta") for m in problem.masks)
    got = REFERENCE(problem, {n: t.to("meta") for n, t in problem.tensors.items()})
    assert {n: (t.shape, t.dtype) for n, t in got.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(t.device.type == "meta" for t in got.values())


def test_the_budget_notices() -> None:
    """A relative error of a thousandth, rows in another order, or NaN is seen in each result."""
    problem, truth, allowed = budget(preset("luong"))
    right = run(REFERENCE, problem)
    compare(right, truth, allowed)
    for name, t in right.items():
        for wrong in (t * 1.001, t.flip(0), t * torch.nan):
            with pytest.raises(Mismatch):
                compare({**right, name: wrong}, truth, allowed)
