"""Searches for target sequences by an attention decoder, from the encoder's memory on."""

from dataclasses import dataclass, replace

from .cases import GATES, Case, Traffic, named
from .decoder_cases import WIDTHS

__all__ = ["GenerateCase"]


@dataclass(frozen=True)
class GenerateCase(Case):
    """T new tokens of each row, of V: the likeliest one after another, or `beams` hypotheses side by side.

    The decoders of `TeacherForced`, between an embedding and a linear layer to V logits. No row ends before T.
    """

    kind = "generate"
    mode = "forward"
    attention: str  # "bahdanau" | "luong"
    cell: str  # "lstm" | "gru"
    beams: int  # 1: greedy
    S: int
    T: int
    B: int
    H: int
    V: int
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return named(
            self.attention, self.cell, self.search, f"S{self.S}", f"T{self.T}", f"B{self.B}", f"H{self.H}",
            f"V{self.V}", self.device != "cpu" and self.device,
        )  # fmt: skip

    @property
    def search(self) -> str:
        """ "greedy", or "beam" and how many."""
        return "greedy" if self.beams == 1 else f"beam{self.beams}"

    @property
    def tokens(self) -> int:
        """Of the results; each beam's step makes one more."""
        return self.T * self.B

    @property
    def forward_flops(self) -> int:
        """The keys, once for each position; for each step of a beam the decoder's products, attention and logits; but
        of the cell's input that is a token, no more products than there are tokens.
        """
        steps, gates = self.beams * self.tokens, GATES[self.cell]
        squares = self.B * self.S + steps * (2 * gates + WIDTHS[self.attention]) + min(steps, self.V) * gates
        return 2 * self.H**2 * squares + steps * (4 * self.H * self.S + 2 * self.H * self.V)

    @property
    def forward_traffic(self) -> Traffic:
        """Each step reads the decoder's weights, the logits', keys and memory, which beams share."""
        squares = 2 * GATES[self.cell] + WIDTHS[self.attention]
        resident = squares * self.H**2 + self.H * (self.V + 2 * self.B * self.S)
        numbers = resident + (GATES[self.cell] + 1) * self.H**2 + self.H * self.B * self.S
        return Traffic(numbers * self.itemsize, resident * self.itemsize, self.T - 1)

    def small(self) -> "GenerateCase":
        return replace(self, S=min(self.S, 4), T=min(self.T, 5), B=min(self.B, 3), H=6, V=12)
