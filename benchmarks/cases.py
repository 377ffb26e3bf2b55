"""What is timed: one call of one layer stack or cell, as a value. FLOPs are those of its matrix products alone."""

import random
from dataclasses import dataclass, fields

__all__ = ["Case"]

GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Case:
    """A call. `forward` records no gradients; `train` is a forward pass and the gradients of input, hx and weights."""

    op: str  # "lstm" | "gru" | "lstm_cell" | "gru_cell"
    mode: str  # "forward" | "train"
    T: int
    B: int
    I: int  # noqa: E741  (the project's letter)
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"  # "float64" | "bfloat16" | "autocast" (fp32 tensors, autocast to bfloat16)
    rows: str = "full"  # "lengths": padded, from T/4 to T steps; "packed": the same rows in a PackedSequence
    hx: bool = False

    def __str__(self) -> str:
        parts = [self.op, self.mode, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        flags = (self.bidirectional and "bi", self.dtype != "float32" and self.dtype, self.rows != "full" and self.rows)
        return "-".join([*parts, *(f for f in flags if f), *(["hx"] if self.hx else [])])

    @property
    def cell(self) -> str:
        """ "lstm" or "gru"."""
        return self.op.removesuffix("_cell")

    @property
    def is_cell(self) -> bool:
        return self.op.endswith("_cell")

    @property
    def lengths(self) -> list[int] | None:
        """Steps of each row, spread evenly from T/4 to T, in random order; None where every row has T."""
        if self.rows == "full":
            return None
        low, spread = self.T / 4, self.T * 3 / 4 / max(self.B - 1, 1)
        steps = [max(1, round(low + spread * row)) for row in range(self.B)]
        steps[-1] = self.T
        random.Random(self.B).shuffle(steps)
        return steps

    @property
    def tokens(self) -> int:
        """Real steps of all rows."""
        return self.T * self.B if self.lengths is None else sum(self.lengths)

    @property
    def flops(self) -> int:
        """2 per multiplication by a weight; training is three times forward, since either gradient costs one more."""
        directions, width, forward = 2 if self.bidirectional else 1, self.I, 0
        for _ in range(self.layers):
            forward += 2 * self.tokens * directions * GATES[self.cell] * self.H * (width + self.H)
            width = directions * self.H
        return forward * (3 if self.mode == "train" else 1)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "Case":
        """The inverse of dataclasses.asdict; unknown keys raise."""
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)} of a case")
        return cls(**values)  # type: ignore[arg-type]
