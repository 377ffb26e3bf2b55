"""What other libraries have published of their speed: cited, not measured. Only what their text says: Haste's charts
and FlashRNN's figures are pictures, of which nothing is read off.
"""

from typing import NamedTuple

from .tables import Table

__all__ = ["Claim", "cited_tables"]


class Claim(NamedTuple):
    """One published figure."""

    library: str
    what: str
    figure: str
    hardware: str
    source: str
    date: str


PAPER = "arXiv:2412.07752 (ICLR 2025), abstract"
CLAIMS = (
    Claim("FlashRNN", "its kernels over plain PyTorch, time", "50 times", "not said there", PAPER, "2024-12-10"),
    Claim("FlashRNN", "CUDA over its Triton kernels, hidden size", "40 times", "not said there", PAPER, "2024-12-10"),
    Claim(
        "FlashRNN", "fused over alternating CUDA kernels, time", "2 to 5 times", "compute capability 8.0 or later",
        "pypi.org/project/flashrnn 1.0.8, description", "2026-09-14",
    ),
    Claim(
        "Haste", "LSTM, over other public implementations", "the fastest at nearly all sizes", "not said there",
        "github.com/lmnt-com/haste at 0c6cfb5, README", "2020",
    ),
)  # fmt: skip


def cited_tables() -> list[Table]:
    """For reports, beside what was measured."""
    return [Table("cited, not measured", ("library", *Claim._fields[1:]), [list(claim) for claim in CLAIMS])]
