"""The tensors of a case, the same for every peer; here the interface of every kind, and those of layers."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .cases import Case, LayerCase

__all__ = ["DTYPES", "LayerProblem", "Problem", "flatten", "module_of", "uniform"]

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "autocast": torch.float32,
}  # fmt: skip
DECIDED = (6.0, -6.0)  # ten standard deviations of what input and state add
CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}  # of layers; of cells, with "Cell"


class Problem(Protocol):
    """Random inputs of a case, its weights, and the gradients that training sends back."""

    @property
    def case(self) -> Case: ...

    def in_float64(self) -> "Problem":
        """The same values, to be computed without rounding."""


@dataclass(frozen=True)
class LayerProblem:
    """Random input of a case, its weights, and the gradients that training sends back.

    Whole sequences get a gradient of their output; calls with a state, which stand in a loop, of the states as well.
    """

    case: LayerCase
    weights: dict[str, Tensor]  # a torch.nn module's state_dict
    x: Tensor  # [T, B, I]; a cell: [B, I]
    hx: tuple[Tensor, ...]  # () | (h,) | (h, c): [L*D, B, H]; a cell: [B, H]
    lengths: Tensor | None  # [B], where the host packs by them
    grads: tuple[Tensor, ...]  # of the first outputs, in the order of `flatten`

    @classmethod
    def draw(cls, case: LayerCase, seed: int = 0) -> "LayerProblem":
        """The same values for every dtype of the same shapes, rounded to it."""
        g, dtype = torch.Generator().manual_seed(seed), DTYPES[case.dtype]
        directions, states = 2 if case.bidirectional else 1, 2 if case.cell == "lstm" else 1
        module = module_of(nn, replace(case, dtype="float32"))
        weights = uniform(module, case.H, dtype, g)
        if case.cell == "rnn_relu":
            _decide(weights)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(case.device, dtype)

        lead = () if case.is_cell else (case.layers * directions,)
        x = normal(case.B, case.I) if case.is_cell else normal(case.T, case.B, case.I)
        lengths = None if case.lengths is None else torch.tensor(case.lengths)
        hx = tuple(normal(*lead, case.B, case.H) for _ in range(states))
        back = tuple(normal(*lead, case.B, case.H) for _ in range(states))
        if not case.is_cell:
            rows = (case.tokens,) if case.rows == "packed" else (case.T, case.B)
            back = (normal(*rows, directions * case.H), *(back if case.hx else ()))
        return cls(case, weights, x, hx if case.hx else (), lengths, back)

    def in_float64(self) -> "LayerProblem":
        case = replace(self.case, dtype="float64")
        weights = {n: w.double() for n, w in self.weights.items()}
        hx, grads = (tuple(t.double() for t in ts) for ts in (self.hx, self.grads))
        return replace(self, case=case, weights=weights, x=self.x.double(), hx=hx, grads=grads)

    def packed(self) -> PackedSequence:
        """The input as callers pack it; done outside the timing where the case has `rows="packed"`."""
        return pack_padded_sequence(self.x.detach(), self.case.lengths or [], enforce_sorted=False)


def uniform(module: nn.Module, hidden: int, dtype: torch.dtype, g: torch.Generator) -> dict[str, Tensor]:
    """A state_dict for `module`, of numbers up to hidden^-1/2 as torch.nn draws them."""
    bound = hidden**-0.5
    return {n: ((torch.rand(p.shape, generator=g) * 2 - 1) * bound).to(dtype) for n, p in module.state_dict().items()}


def _decide(weights: dict[str, Tensor]) -> None:
    """Of a ReLU's units every other is well above 0, the others below: near 0 rounding would choose the derivative."""
    for name, w in weights.items():
        if name.startswith("bias_ih"):
            w.copy_(torch.tensor(DECIDED).repeat(len(w))[: len(w)])
        elif name.startswith("weight_hh"):
            w.mul_(0.25)  # of states as large as the biases


def module_of(package: ModuleType, case: LayerCase, **options: Any) -> nn.Module:
    """The module of `package`, which names its classes as torch.nn does, that makes the case's call."""
    kind = getattr(package, CLASSES[case.cell] + ("Cell" if case.is_cell else ""))
    options = options | {"dtype": DTYPES[case.dtype]}
    if case.cell.startswith("rnn_"):
        options["nonlinearity"] = case.cell.removeprefix("rnn_")
    if not case.is_cell:
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    module: nn.Module = kind(case.I, case.H, **options)
    return module


def flatten(value: Any) -> list[Tensor]:
    """The tensors of a module's outputs, in order: output, h, c; of packed data, the data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flatten(part)]
