"""Calls of attention decoders, and of an attention by itself. One width H: inputs, states, memory, attention units."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import corpus
from .cases import GATES, Case, Traffic, named, spread

__all__ = ["WIDTHS", "AttentionCase", "CorpusCase", "DecoderCase", "Lengths", "TeacherForced"]

WIDTHS = {  # H x H products of a step beside the cell's, whose input is y, what is fed, and h: 3 for each gate
    "bahdanau": 1,  # the query's
    "luong": 2,  # the attentional state's, of context and state
}


class Lengths(NamedTuple):
    """Of one batch, row by row."""

    source: tuple[int, ...]  # positions to attend to, of S = the most
    target: tuple[int, ...]  # steps, of T = the most

    @property
    def pairs(self) -> int:
        """Of a step and a position it attends to."""
        return sum(s * t for s, t in zip(*self, strict=True))


class TeacherForced(Case):
    """A decoder of one layer over whole targets: "bahdanau", additive attention before the cell, whose state is the
    output (Bahdanau et al. 2014); or "luong", general attention after it, with input feeding and the attentional state
    as output (Luong et al. 2015).
    """

    attention: str
    cell: str  # "lstm" | "gru"
    H: int

    @property
    @abstractmethod
    def batches(self) -> list[Lengths]:
        """One after another, each a call by itself."""

    @property
    def tokens(self) -> int:
        return sum(sum(batch.target) for batch in self.batches)

    @property
    def forward_flops(self) -> int:
        """The keys, once for each position; the step's products; for each pair, score (2 H) and context (2 H)."""
        positions = sum(sum(batch.source) for batch in self.batches)
        pairs = sum(batch.pairs for batch in self.batches)
        squares = positions + self.tokens * (3 * GATES[self.cell] + WIDTHS[self.attention])
        return 2 * self.H**2 * squares + 4 * self.H * pairs

    @property
    def forward_traffic(self) -> Traffic:
        """Each step reads the weights of what is fed and of h, its attention's, keys and memory."""
        positions = sum(sum(batch.source) for batch in self.batches)
        steps = sum(max(batch.target, default=0) for batch in self.batches)
        squares, width = 2 * GATES[self.cell] + WIDTHS[self.attention], 2 * self.H * positions // len(self.batches)
        resident = squares * self.H**2 + width
        numbers = (squares + GATES[self.cell] + 1) * self.H**2 + self.H * (positions + 2 * self.tokens)
        return Traffic(numbers * self.itemsize, resident * self.itemsize, steps - len(self.batches))


@dataclass(frozen=True)
class DecoderCase(TeacherForced):
    """One batch, every row of T steps."""

    kind = "decoder"
    attention: str
    cell: str
    mode: str
    S: int
    T: int
    B: int
    H: int
    dtype: str = "float32"
    rows: str = "full"  # "lengths": sources of S/4 to S positions, by a mask; a full mask otherwise
    device: str = "cpu"

    def __str__(self) -> str:
        return named(
            self.attention, self.cell, self.mode, f"S{self.S}", f"T{self.T}", f"B{self.B}", f"H{self.H}",
            self.rows != "full" and self.rows, self.dtype != "float32" and self.dtype,
            self.device != "cpu" and self.device,
        )  # fmt: skip

    @property
    def batches(self) -> list[Lengths]:
        return [_lengths(self.B, self.S, self.T, self.rows)]

    def small(self) -> "DecoderCase":
        return replace(self, S=min(self.S, 4), T=min(self.T, 5), B=min(self.B, 3), H=6)


@dataclass(frozen=True)
class CorpusCase(TeacherForced):
    """Batches with the lengths of a real corpus."""

    kind = "corpus"
    attention: str
    cell: str
    mode: str
    source: str  # of `corpus.SOURCES`
    H: int
    count: int = 8  # batches, spread evenly over the corpus's by size
    B: int = corpus.ROWS  # rows of each that are kept
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return named(
            self.attention, self.cell, self.mode, self.source, f"x{self.count}", f"B{self.B}", f"H{self.H}",
            self.dtype != "float32" and self.dtype, self.device != "cpu" and self.device,
        )  # fmt: skip

    @property
    def batches(self) -> list[Lengths]:
        chosen = corpus.evenly(corpus.SOURCES[self.source](), self.count)
        return [Lengths(tuple(source[: self.B]), tuple(target[: self.B])) for source, target in chosen]

    def small(self) -> "CorpusCase":
        return replace(self, count=2, B=3, H=6)


@dataclass(frozen=True)
class AttentionCase(Case):
    """T queries of each row against its S keys, which exist already."""

    kind = "attention"
    score: str  # "additive" | "dot"
    mode: str
    S: int
    T: int
    B: int
    H: int
    dtype: str = "float32"
    rows: str = "full"  # as in DecoderCase
    device: str = "cpu"

    def __str__(self) -> str:
        return named(
            self.score, self.mode, f"S{self.S}", f"T{self.T}", f"B{self.B}", f"H{self.H}",
            self.rows != "full" and self.rows, self.dtype != "float32" and self.dtype,
            self.device != "cpu" and self.device,
        )  # fmt: skip

    @property
    def lengths(self) -> Lengths:
        return _lengths(self.B, self.S, self.T, self.rows)

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def forward_flops(self) -> int:
        query = 2 * self.H**2 * self.tokens if self.score == "additive" else 0
        return query + 4 * self.H * self.lengths.pairs

    @property
    def forward_traffic(self) -> Traffic:
        """No step waits for another; keys and memory stay for all."""
        weights = self.H**2 if self.score == "additive" else 0
        numbers = weights + 2 * self.H * (sum(self.lengths.source) + self.tokens)
        return Traffic(numbers * self.itemsize, 0, 0)

    def small(self) -> "AttentionCase":
        return replace(self, S=min(self.S, 4), T=min(self.T, 5), B=min(self.B, 3), H=6)


def _lengths(rows: int, positions: int, steps: int, kind: str) -> Lengths:
    source = [positions] * rows if kind == "full" else spread(rows, positions)
    return Lengths(tuple(source), (steps,) * rows)
