"""Weights that something computes before each call: parametrizations and pruning, without warnings or more copies."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from tests.modes.cases import Case, H, I, assert_same, flatten, results
from tests.modes.modes import ORTHOGONAL, PARAMETRIZED, PRUNE, SPECTRAL_NORM, WEIGHT_DROP, WEIGHT_NORM


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class WeightDrop(nn.Module):
    """DropConnect on a recurrent weight (Merity et al. 2018, AWD-LSTM, section 2)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, w: Tensor) -> Tensor:
        return nn.functional.dropout(w, self.p, self.training)


class Oracle(nn.Module):
    """torch.nn's module, given a weight that the parametrization has made once for the call."""

    def __init__(self, stock: nn.Module, name: str) -> None:
        super().__init__()
        self.stock, self.name, self.w = stock, name, nn.Parameter(getattr(stock, name).detach().clone())
        getattr(stock, name).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return torch.func.functional_call(self.stock, {self.name: self.w}, x)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradient of x, then those of parameters; the parametrized ones last, as registered."""
    own, computed = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (computed if "parametrizations" in name else own).append(p)
    return results(module, x, [*own, *computed])


def check(case: Case, parametrize_it: Callable[[nn.Module, str], Any]) -> None:
    """Two steps of training, eval mode, a copy, and after removal. torch.nn's layers compute weights several times a
    call, which moves spectral norm's state and draws again: the oracle does so once, as fastseq."""
    stock, fast = case.twins()
    oracle, found = Oracle(stock, case.weight), []
    for module, name in ((oracle, "w"), (fast, case.weight)):
        torch.manual_seed(4)
        parametrize_it(module, name)
        torch.manual_seed(5)
        steps = [gradients(module, case.input()), gradients(module, case.input(seed=2))]
        steps += [gradients(copy.deepcopy(module), case.input()), flatten(module.eval()(case.input()))]
        parametrize.remove_parametrizations(module, name)
        found.append([*steps, flatten(module(case.input()))])
    assert_same(found[1], found[0], 64)  # the parametrization's own sums come before and behind the layer's
    assert type(fast) is getattr(fastseq, case.kind)


@WEIGHT_NORM
def test_weight_norm(case: Case) -> None:
    check(case, parametrizations.weight_norm)


@SPECTRAL_NORM
def test_spectral_norm(case: Case) -> None:
    check(case, parametrizations.spectral_norm)


@ORTHOGONAL
def test_orthogonal(case: Case) -> None:
    check(case, parametrizations.orthogonal)


@WEIGHT_DROP
def test_weight_drop(case: Case) -> None:
    """Another mask in each call."""
    check(case, lambda m, name: parametrize.register_parametrization(m, name, WeightDrop(0.5)))


class Operators(TorchDispatchMode):
    """The operators of a call, and the weights that fastseq's are given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.weights: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if "fastseq" in str(func):
            self.weights += [w.data_ptr() for w in args[4]]
        return func(*args, **(kwargs or {}))


class Kept(nn.Module):
    """Leaves a weight as it is, and remembers what it gave."""

    def forward(self, w: Tensor) -> Tensor:
        self.given = w * 1.0
        return self.given


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_copied_but_by_the_parametrization(kind: str, grad: bool) -> None:
    """One product for the parametrized weight is all that is added; the kernels read where it lies, and the others."""
    case = Case(kind, "cpu")
    plain = case.fast()
    module = copy.deepcopy(plain)
    parametrize.register_parametrization(module, case.weight, Kept())
    counts = []
    with torch.set_grad_enabled(grad):
        for m in (plain, module):
            with Operators() as seen:
                m(case.input())
            counts.append(seen.names)
    assert sorted(counts[1]) == sorted([*counts[0], "aten.mul.Tensor"])
    given = module.parametrizations[case.weight][0].given
    assert given.data_ptr() in seen.weights
    others = {p.data_ptr() for name, p in module.named_parameters() if "parametrizations" not in name}
    assert others <= set(seen.weights)


def test_each_weight_is_computed_once_in_a_call() -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, w: Tensor) -> Tensor:
            Counted.calls += 1
            return w.tanh()

    module = fastseq.LSTM(I, H, num_layers=2, bidirectional=True)
    for name in module._flat_weights_names[::2]:
        parametrize.register_parametrization(module, name, Counted())
    Counted.calls = 0
    module(torch.randn(4, 3, I))
    assert Counted.calls == len(module._flat_weights_names) // 2


@PARAMETRIZED
def test_accelerate_and_undo(case: Case) -> None:
    """torch.nn's module keeps its parametrization, parameters and results; so does a copy, which stays as it is."""
    stock = case.twins()[0]
    parametrizations.weight_norm(stock, case.weight)
    untouched = copy.deepcopy(stock)  # before a call: torch.nn's layers cannot be copied behind one
    parameters, expected = list(stock.parameters()), results(untouched, case.input())
    (change,) = fastseq.accelerate(stock)
    assert change.action == "accelerated"
    assert isinstance(stock, getattr(fastseq, case.kind))
    assert not isinstance(untouched, getattr(fastseq, case.kind))  # though it had the same class
    stock.backend = case.backend
    assert [id(p) for p in stock.parameters()] == [id(p) for p in parameters]
    assert_same(results(stock, case.input()), expected, 64)
    assert_same(results(copy.deepcopy(stock), case.input()), expected, 64)
    assert [c.action for c in fastseq.accelerate(stock)] == ["skipped"]
    (change,) = fastseq.accelerate(stock, undo=True)
    assert change.action == "reverted"
    assert type(stock).__mro__[1] is getattr(nn, case.kind)
    assert_same(results(stock, case.input()), expected, 0)
    fastseq.accelerate(stock)
    parametrize.remove_parametrizations(stock, case.weight)
    assert type(stock) is getattr(fastseq, case.kind)
    assert_same(flatten(stock(case.input())), expected[: len(flatten(stock(case.input())))], 64)


def test_parametrized_after_accelerate_is_reverted_too() -> None:
    module = nn.GRU(I, H)
    fastseq.accelerate(module)
    parametrizations.weight_norm(module, "weight_hh_l0")
    assert [c.action for c in fastseq.accelerate(module, undo=True)] == ["reverted"]
    assert type(module).__mro__[1] is nn.GRU
    with pytest.raises(RuntimeError, match="only supported through state_dict"):  # torch's own word, kept
        copy.copy(module).__getstate__()


@PRUNE
def test_pruned(case: Case) -> None:
    """Masks on two weights; gradients of the originals, and the weights for good after prune.remove."""
    found = []
    for module in case.twins():
        names = case.weight, case.weight.replace("hh", "ih")
        prune.l1_unstructured(module, names[0], 0.4)
        prune.ln_structured(module, names[1], 0.25, n=2, dim=0)
        pruned = [results(module, case.input())]
        with torch.no_grad():
            getattr(module, names[0] + "_orig").mul_(2)
        pruned.append(results(module, case.input()))
        for name in names:
            prune.remove(module, name)
        found.append([*pruned, flatten(module(case.input()))])
    assert_same(found[1], found[0])


class Untouched(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_under_a_mode_of_torch_functions(kind: str) -> None:
    case = Case(kind, "cpu")
    module = case.fast()
    expected = results(module, case.input())
    with Untouched():
        assert_same(results(module, case.input()), expected, 0)
