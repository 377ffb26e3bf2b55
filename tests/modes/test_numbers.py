"""Dtypes, autocast, loss scaling and deterministic algorithms: torch.nn's results, or closer to those in fp64."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.modes.cases import Case, assert_same, flatten, loss_of, results
from tests.modes.modes import AUTOCAST, BF16, DETERMINISTIC, DOUBLE, HALF, SCALER
from tests.twins import compare, outcome


def near(x: Tensor, k: int) -> Tensor:
    """A problem beside x: one problem's errors may be small by luck, the worst of a few are the budget."""
    return (x * (1 + k / 8)).bfloat16().double()


def truths(stock: nn.Module, x: Tensor) -> list[Any]:
    return [outcome(stock, near(x, k), None, torch.float64) for k in range(4)]


def rounded(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """As bf16: the arithmetic is that, whatever dtype it is handed back in."""
    return {name: t.bfloat16() for name, t in found.items()}


@AUTOCAST
def test_autocast(case: Case) -> None:
    """Outputs in torch.nn's dtype; they and every gradient err at most twice as much as torch.nn's."""
    stock, fast = case.twins(bidirectional=True)
    x = case.input()
    exact = truths(stock, x)
    with torch.autocast("cpu", torch.bfloat16):
        low = [outcome(stock, near(x, k), None, torch.float32) for k in range(4)]
        got = outcome(fast, near(x, 0), None, torch.float32)
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in low[0].items()}
    compare(rounded(got), [rounded(r) for r in low], exact)


@BF16
def test_bfloat16(case: Case) -> None:
    """As under autocast, with weights that bf16 holds."""
    stock, fast = (m.bfloat16() for m in case.twins(bidirectional=True))
    x = case.input()
    low = [outcome(stock, near(x, k), None, torch.bfloat16) for k in range(4)]
    got = outcome(fast, near(x, 0), None, torch.bfloat16)
    compare(got, low, truths(stock.double(), x))


@HALF
def test_half(case: Case) -> None:
    """Outputs without gradients: each step rounds h once, and every product of a gate once more; T = 4 steps."""
    stock, fast = (m.half() for m in case.twins())
    x = case.input().half()
    with torch.no_grad():
        got, exact = flatten(fast(x)), flatten(stock.double()(x.double()))
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float16
        assert (a.double() - b).abs().max() <= 4 * 2 * torch.finfo(torch.float16).eps * b.abs().max()


@DOUBLE
def test_double(case: Case) -> None:
    stock, fast = (m.double() for m in case.twins(bidirectional=True))
    x = case.input().double()
    assert_same(results(fast, x), results(stock, x))


@SCALER
def test_grad_scaler(case: Case) -> None:
    """A power of two on the loss changes no bit of a step; a loss that overflows skips it."""
    _, plain = case.twins()
    scaled, x = copy.deepcopy(plain), case.input()
    for module, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for factor in (1.0, 1.0) if scaler is None else (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of([o.float() for o in flatten(module(x))]) * factor
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert_same(list(scaled.parameters()), list(plain.parameters()), 0)
    assert scaler is not None
    assert scaler.get_scale() == 2.0**9  # halved by the step that overflowed


@DETERMINISTIC
def test_deterministic_algorithms(case: Case) -> None:
    """Nothing is refused, and the same call gives the same bits; memory is filled with NaN meanwhile."""
    _, fast = case.twins(num_layers=2, bidirectional=True)
    expected = results(fast, case.input())
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            assert_same(results(fast, case.input()), expected, 0)
    finally:
        torch.use_deterministic_algorithms(False)
