"""What the adapters of toolkits' encoders and decoders share: checks of their parts, parameters, states, dropout."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modules import GRU, LSTM, GRUCell, LSTMCell
from ..spec import CellParams, DecoderState
from .weights import KINDS

__all__ = [
    "CELLS", "LAYERS", "Adapter", "Draws", "cell_params", "cells_differ", "first_state", "last_state", "layer_params",
    "obstacle", "own", "rnn_differs",
]  # fmt: skip

LAYERS = {nn.LSTM: "lstm", LSTM: "lstm", nn.GRU: "gru", GRU: "gru"}
NOISE = ("zoneout", "recurrent_dropout")  # of fastseq's layers, which torch's have not
CELLS = {nn.LSTMCell: "lstm", LSTMCell: "lstm", nn.GRUCell: "gru", GRUCell: "gru"}


class Adapter(nn.Module):
    """Comes before the toolkit's class, `stock`, in the class that `registry.adapter_of` makes of both."""

    stock: type[nn.Module]

    @abstractmethod
    def obstacle(self) -> str | None:
        """Why this instance cannot run as one operator; None if it can. Also asked of instances of `stock`."""


def own(name: str, module: Any, *kinds: type) -> str | None:
    """Why a part that the adapter passes over is not what it takes it for; None if it is."""
    if type(module) not in kinds:
        expected = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        if parametrize.is_parametrized(module):
            return f"{name} is parametrized"
        return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, not torch's {expected}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks, which would not run"
    return None


def obstacle(*found: str | None) -> str | None:
    """The first that is one."""
    return next((why for why in found if why is not None), None)


def rnn_differs(name: str, rnn: Any) -> str | None:
    """Why a toolkit's layers are not torch's LSTM or GRU of either direction, with biases; None if they are."""
    found = own(name, rnn, *LAYERS)
    if found is not None:
        return found
    ends = ("", "_reverse") if rnn.bidirectional else ("",)
    names = {f"{kind}_l{index}{end}" for kind in KINDS for index in range(rnn.num_layers) for end in ends}
    plain = rnn.batch_first and rnn._parameters.keys() == names and not any(getattr(rnn, n, 0) for n in NOISE)
    return None if plain else f"{name} has other options than the toolkit gives it: {rnn}"


def cells_differ(name: str, cells: Any) -> str | None:
    """Why a toolkit's layers are not torch's cells with biases; None if they are."""
    for index, cell in enumerate(cells):
        found = own(f"{name}.{index}", cell, *CELLS)
        if found is None and not cell.bias:
            found = f"{name}.{index} has no bias"
        if found is not None:
            return found
    return None


def layer_params(rnn: nn.Module) -> tuple[CellParams, ...]:
    """The layers of torch.nn's LSTM or GRU of one direction."""
    count: int = rnn.num_layers  # type: ignore[assignment]
    return tuple(tuple(getattr(rnn, f"{kind}_l{index}") for kind in KINDS) for index in range(count))


def cell_params(cells: nn.ModuleList) -> tuple[CellParams, ...]:
    """Layers that are cells of torch.nn."""
    return tuple(tuple(getattr(cell, kind) for kind in KINDS) for cell in cells)


def first_state(leaves: tuple[Any, ...], dim: int, fed: Tensor | None) -> DecoderState:
    """Of h, or h and c, with layers along `dim`, and what is fed. In fp32 beside fp16 or bf16, as within the loop."""

    def wide(t: Tensor) -> Tensor:
        return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

    layers = tuple(zip(*(wide(leaf).unbind(dim) for leaf in leaves), strict=True))
    return DecoderState(layers, None if fed is None else wide(fed))


def last_state(state: DecoderState, dim: int, like: Tensor) -> tuple[Tensor, ...]:
    """h, or h and c, with layers along `dim`, in the dtype of `like`, as the toolkit's would be."""
    return tuple(torch.stack(leaf, dim).to(like.dtype) for leaf in zip(*state.layers, strict=True))


class Draws:
    """Dropout's factors in a toolkit's order: step by step, and in each step one after another.

    On a CPU they are bit for bit what torch.nn.functional.dropout draws for tensors of these shapes; on other devices
    they have the same distribution.
    """

    def __init__(self, steps: int, like: Tensor) -> None:
        self.steps, self.like = steps, like
        self._asked: list[tuple[float, Tensor]] = []

    def add(self, p: float, *shape: int) -> Tensor | None:
        """Factors [T, *shape], which `draw` fills in the order of these calls; None where p is 0."""
        if p == 0:
            return None
        factors = torch.zeros((self.steps, *shape), dtype=self.like.dtype, device=self.like.device)
        if p < 1:  # at 1 torch draws nothing
            self._asked.append((p, factors))
        return factors

    def draw(self) -> None:
        for t in range(self.steps):
            for p, factors in self._asked:
                factors[t].bernoulli_(1 - p)
        for p, factors in self._asked:
            factors.div_(1 - p)
