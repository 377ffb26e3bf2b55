"""Planted faults, and the checks of this suite that must notice each: a check that passes everything proves nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import rnn as ops
from tests.oracle import Case, Mismatch, Problem, check_layer, check_second
from tests.test_onnxruntime import check_against_onnxruntime
from tests.test_sweep import check_module

if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

Forward = Callable[..., tuple[Tensor, ...]]
LSTM = Case("lstm", rows="lengths", bidirectional=True)
GRU = Case("gru", rows="lengths", bidirectional=True)
FULL = Case("lstm", bidirectional=True)
RESETS = Case("lstm", rows="lengths", bidirectional=True, resets=True)

CHECKS: dict[str, Callable[[], None]] = {
    "layer_lstm": lambda: check_layer(ops.rnn_layer, Problem.draw(LSTM)),
    "layer_gru": lambda: check_layer(ops.rnn_layer, Problem.draw(GRU)),
    "layer_bf16": lambda: check_layer(ops.rnn_layer, Problem.draw(Case("gru", torch.bfloat16, rows="lengths"))),
    "resets_lstm": lambda: check_layer(ops.rnn_layer, Problem.draw(RESETS)),
    "resets_gru": lambda: check_layer(ops.rnn_layer, Problem.draw(Case("gru", batch_first=True, resets=True))),
    "resets_second": lambda: check_second(ops.rnn_layer, Problem.draw(Case("gru", T=3, B=3, I=2, H=9, resets=True))),
    "second": lambda: check_second(ops.rnn_layer, Problem.draw(Case("gru", T=3, B=3, I=2, H=9))),
    "onnxruntime": lambda: check_against_onnxruntime(ops.rnn_layer, LSTM, 0),
    "module": lambda: check_module("lstm", 24, "cpu"),  # padded, one layer, with states
}


def scaled(by: float) -> Callable[[Forward], Forward]:
    def mutate(forward: Forward) -> Forward:
        def mutant(*args: Any) -> tuple[Tensor, ...]:
            out, *rest = forward(*args)
            return out * by, *rest

        return mutant

    return mutate


def replaced(*places: int) -> Callable[[Forward], Forward]:
    """None in place of these arguments."""

    def mutate(f: Forward) -> Forward:
        return lambda *args: f(*(None if k in places else a for k, a in enumerate(args)))

    return mutate


def shifted(place: int) -> Callable[[Forward], Forward]:
    """An argument [T, B], or [B, T], moved by one step or row."""

    def mutate(f: Forward) -> Forward:
        return lambda *args: f(*(None if a is None else a.roll(1) if k == place else a for k, a in enumerate(args)))

    return mutate


def cleared(place: int) -> Callable[[Forward], Forward]:
    """Zeros in one of the results."""

    def mutate(f: Forward) -> Forward:
        def mutant(*args: Any) -> Any:
            results = list(f(*args))
            results[place] = torch.zeros_like(results[place])
            return results

        return mutant

    return mutate


def one_way(forward: Forward) -> Forward:
    """The two directions of the output exchanged."""
    return lambda *args: (lambda out, *rest: (out.roll(out.shape[-1] // 2, -1), *rest))(*forward(*args))


def detached(gradients: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Right first derivatives that nothing can be differentiated through but a graph of zeros."""
    return lambda *args: [None if d is None else d.detach() + 0 * d for d in gradients(*args)]


# name: (function of fastseq.ops.rnn, its mutation, the checks that must fail)
MUTANTS: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "output_x_1.001": ("_forward", scaled(1.001), {"layer_lstm", "layer_gru", "onnxruntime", "module"}),
    "output_x_1.00001": ("_forward", scaled(1.00001), {"layer_lstm", "layer_gru"}),
    "output_x_1.1": ("_forward", scaled(1.1), {"layer_bf16"}),
    "directions_exchanged": ("_forward", one_way, {"layer_lstm", "layer_gru", "onnxruntime"}),
    "lengths_ignored": ("_forward", replaced(5), {"layer_lstm", "layer_gru", "layer_bf16", "onnxruntime"}),
    "resets_ignored": ("_forward", replaced(6), {"resets_lstm", "resets_gru", "resets_second"}),
    "resets_ignored_by_backward": ("_backward", replaced(10), {"resets_lstm", "resets_gru"}),
    "resets_one_step_late": ("_forward", shifted(6), {"resets_lstm", "resets_gru"}),
    "hx_ignored": ("_forward", replaced(2, 3), {"layer_lstm", "layer_gru", "layer_bf16", "onnxruntime", "module"}),
    "input_gradient_cut": ("_backward", cleared(0), {"layer_lstm", "layer_gru", "layer_bf16", "module"}),
    "state_gradient_cut": ("_backward", cleared(1), {"layer_lstm", "layer_gru", "layer_bf16", "module"}),
    "weight_gradient_cut": ("_backward", cleared(4), {"layer_lstm", "layer_gru", "layer_bf16", "module"}),
    "final_state_gradient_ignored": ("_backward", replaced(2), {"layer_lstm", "layer_gru", "layer_bf16", "module"}),
    "second_derivative_cut": ("through_reference", detached, {"second"}),
}


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_wrong_without_a_fault(check: str) -> None:
    """The checks below pass on the code as it is."""
    CHECKS[check]()


@pytest.mark.parametrize(("mutant", "check"), [(m, c) for m, (*_, checks) in MUTANTS.items() for c in sorted(checks)])
def test_fault_is_noticed(mutant: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check fails on each fault that is in its reach."""
    name, mutate, _ = MUTANTS[mutant]
    monkeypatch.setattr(ops, name, mutate(getattr(ops, name)))
    monkeypatch.setattr(ops, "_NATIVE", ops.Kernels(ops._forward, ops._backward))  # which is called instead of these
    with pytest.raises(Mismatch):
        CHECKS[check]()


def test_nan_is_noticed() -> None:
    """A comparison written `diff > tolerance` would let it pass."""

    def layer(*args: Any) -> Any:
        out, *rest = ops.rnn_layer(*args)
        return out.masked_fill(out == out.max(), torch.nan), *rest

    with pytest.raises(Mismatch, match="errs by nan"):
        check_layer(layer, Problem.draw(FULL))
