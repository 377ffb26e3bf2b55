"""What is timed: one call, as a value; here the interface of every kind, and the calls of layer stacks and cells.

FLOPs are those of matrix products alone: with weights, and of an attention with keys and memory.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

from fastseq import _gpus

__all__ = ["GATES", "ITEMSIZE", "Case", "LayerCase", "Traffic", "named", "spread"]

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
ITEMSIZE = {"float64": 8, "float32": 4, "autocast": 4, "bfloat16": 2, "float16": 2}

SomeCase = TypeVar("SomeCase", bound="Case")


class Traffic(NamedTuple):
    """What a forward pass must move at least, in bytes."""

    once: int  # inputs, outputs and weights
    resident: int  # of these, what a step reads that was read before
    again: int  # such steps


class Case(ABC):
    """A call. `forward` records no gradients; `train` is a forward pass and the gradients of all inputs and weights."""

    kind: ClassVar[str]  # its key in `kinds.KINDS`
    mode: str  # "forward" | "train"
    dtype: str  # "float32" | "float64" | "bfloat16" | "autocast" (fp32 tensors, autocast to bfloat16)
    device: str  # "cpu" | "cuda"

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Real steps of all rows."""

    @property
    @abstractmethod
    def forward_flops(self) -> int:
        """2 per multiplication in a product, of real steps and positions."""

    @property
    @abstractmethod
    def forward_traffic(self) -> Traffic:
        """Of the whole call. A backward pass moves as much again: gradients in, gradients out, the same weights."""

    @abstractmethod
    def small(self: SomeCase) -> SomeCase:
        """The same kind of call, of few numbers."""

    @property
    def flops(self) -> int:
        """Training is three times forward, since the gradient of either operand costs one product more."""
        return self.forward_flops * (3 if self.mode == "train" else 1)

    @property
    def passes(self) -> int:
        """Over the steps: forward, and in training backward."""
        return 2 if self.mode == "train" else 1

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its dtype."""
        return ITEMSIZE[self.dtype]

    def unavailable(self) -> str | None:
        """What this machine lacks for it."""
        return _gpus.no_gpu() if self.device == "cuda" else None


@dataclass(frozen=True)
class LayerCase(Case):
    """A call of a layer stack or a cell."""

    kind = "layers"
    op: str  # of GATES, a layer stack; with "_cell", a cell
    mode: str
    T: int
    B: int
    I: int  # noqa: E741  (the project's letter)
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    rows: str = "full"  # "lengths": padded, from T/4 to T steps; "packed": the same rows in a PackedSequence
    hx: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        return named(
            self.op, self.mode, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}",
            self.layers > 1 and f"L{self.layers}", self.bidirectional and "bi", self.dtype != "float32" and self.dtype,
            self.rows != "full" and self.rows, self.hx and "hx", self.device != "cpu" and self.device,
        )  # fmt: skip

    @property
    def cell(self) -> str:
        """A key of GATES."""
        return self.op.removesuffix("_cell")

    @property
    def is_cell(self) -> bool:
        return self.op.endswith("_cell")

    @property
    def lengths(self) -> list[int] | None:
        """Steps of each row; None where every row has T."""
        return None if self.rows == "full" else spread(self.B, self.T)

    @property
    def tokens(self) -> int:
        return self.T * self.B if self.lengths is None else sum(self.lengths)

    @property
    def forward_flops(self) -> int:
        return sum(2 * self.tokens * weights for weights in self._weights())

    @property
    def forward_traffic(self) -> Traffic:
        """Layers are read one after the other, each for all steps; under autocast their W_hh as the bf16 it becomes."""
        directions = 2 if self.bidirectional else 1
        biases = 2 * self.layers * directions * GATES[self.cell] * self.H
        numbers = sum(self._weights()) + biases + self.tokens * (self.I + directions * self.H)
        recurrent = directions * GATES[self.cell] * self.H**2 * (2 if self.dtype == "autocast" else self.itemsize)
        return Traffic(numbers * self.itemsize, recurrent, self.layers * (self.T - 1))

    def _weights(self) -> list[int]:
        """Numbers in the matrices of each layer; without W_hh where no step has a state to multiply."""
        directions, hidden = 2 if self.bidirectional else 1, self.H if self.T > 1 or self.hx else 0
        widths = [self.I, *[directions * self.H] * (self.layers - 1)]
        return [directions * GATES[self.cell] * self.H * (width + hidden) for width in widths]

    def small(self) -> "LayerCase":
        return replace(self, T=min(self.T, 5), B=min(self.B, 3), I=min(self.I, 4), H=6)


def named(*parts: str | bool) -> str:
    """The parts that are there, as one word."""
    return "-".join(part for part in parts if isinstance(part, str))


def spread(rows: int, most: int) -> list[int]:
    """Lengths spread evenly from most / 4 to most, in random order."""
    low, step = most / 4, most * 3 / 4 / max(rows - 1, 1)
    lengths = [max(1, round(low + step * row)) for row in range(rows)]
    lengths[-1] = most
    random.Random(rows).shuffle(lengths)
    return lengths
