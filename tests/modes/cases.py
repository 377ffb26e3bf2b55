"""The modules under test, and what a mode of PyTorch is here: a row of the table in docs/modes.md, held by tests.

A test of a mode is decorated with it and runs once for every case. Where the mode has a limit for a case, the test must
fail with that limit's error: what the table refuses is tested like what it allows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastseq
from tests.twins import H, I, twins

__all__ = [
    "BACKENDS", "CASES", "CELLS", "Case", "H", "Holder", "I", "Limit", "Mode", "assert_same", "coefficients", "flatten",
    "loss_of", "results",
]  # fmt: skip

CELLS: dict[str, tuple[str, dict[str, Any]]] = {  # a class of torch.nn and of fastseq, and its options
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell": ("RNNCell", {}),
}
BACKENDS = ("cpu", "torch", "reference", "auto")  # those of a machine without a GPU
T, B = 4, 3  # unless a test asks for others


@dataclass(frozen=True)
class Case:
    """A module of one class on one backend."""

    cell: str
    backend: str

    def __str__(self) -> str:
        return f"{self.cell}-{self.backend}"

    @property
    def kind(self) -> str:
        """The name of the class."""
        return CELLS[self.cell][0]

    @property
    def options(self) -> dict[str, Any]:
        """What the class is built with beside its sizes."""
        return CELLS[self.cell][1] | {"backend": self.backend}

    @property
    def layer(self) -> bool:
        """Whether it runs over time."""
        return not self.kind.endswith("Cell")

    @property
    def weight(self) -> str:
        """The name of W_hh."""
        return "weight_hh_l0" if self.layer else "weight_hh"

    def twins(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """(torch.nn's, fastseq's) with the same initial weights; options are those of a layer."""
        return twins(self.kind, **self.options, **(options if self.layer else {}))

    def fast(self, **options: Any) -> nn.Module:
        return self.twins(**options)[1]

    def input(self, steps: int = T, rows: int = B, seed: int = 1) -> Tensor:
        """[T, B, I], of a cell [B, I]."""
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*((steps, rows) if self.layer else (rows,)), I, generator=g)


CASES = [Case(cell, backend) for cell in CELLS for backend in BACKENDS]


@dataclass(frozen=True)
class Limit:
    """What a mode cannot do on some cases, and how a user learns of it."""

    reason: str  # a footnote of the table
    backends: tuple[str, ...]
    raises: Any = fastseq.InputError  # None: nothing is raised, and the test itself looks for the limit
    match: str = ""  # within the message
    kinds: tuple[str, ...] = ()  # names of classes; (): all

    def holds(self, case: Case) -> bool:
        return case.backend in self.backends and (not self.kinds or case.kind in self.kinds)


@dataclass(frozen=True)
class Mode:
    """A way of PyTorch to use a module; decorates its tests, which take `case` and any fixtures."""

    title: str  # markdown
    limits: tuple[Limit, ...] = ()

    def limit(self, case: Case) -> Limit | None:
        """The first that holds for the case."""
        return next((limit for limit in self.limits if limit.holds(case)), None)

    def __call__(self, test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def checked(**given: Any) -> None:
            limit = self.limit(given["case"])
            if limit is None or limit.raises is None:
                test(**given)
                return
            with pytest.raises(limit.raises, match=limit.match):
                test(**given)

        cases = pytest.mark.parametrize("case", CASES, ids=str)
        return pytest.mark.mode(self.title)(cases(checked))


class Holder(nn.Module):
    """A model that has the module within, as models do."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor):  # of whatever type: torch.jit.script infers it
        return self.rnn(x)


flatten = tree_leaves  # the tensors of an output


def coefficients(t: Tensor) -> Tensor:
    """What an output is weighted with in a loss: different for each element."""
    return torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)


def loss_of(outputs: Any) -> Tensor:
    """A scalar that depends on every element of every output."""
    return torch.stack([(o * coefficients(o)).sum() for o in flatten(outputs)]).sum()


def results(module: Callable[..., Any], x: Tensor, parameters: list[Tensor] | None = None) -> list[Tensor]:
    """The outputs, and the gradients of the input and of every parameter."""
    parameters = list(module.parameters()) if parameters is None else parameters  # type: ignore[attr-defined]
    x = x.clone().requires_grad_()
    outputs = flatten(module(x))
    return [*(o.detach() for o in outputs), *torch.autograd.grad(loss_of(outputs), [x, *parameters])]


def assert_same(got: Any, expected: Any, units: int = 32) -> None:
    """Within so many units in the last place of each tensor's largest value; 0: the same bits.

    Two ways through fp32 over sums of at most 32 terms: each addition may round once more or less.
    """
    for a, b in zip(flatten(got), flatten(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= units * torch.finfo(b.dtype).eps * largest, f"{error:.3g} of {largest:.3g}"  # NaN fails
