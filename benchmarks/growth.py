"""How a call's time grows with each of its sizes: sweeps of one size, the fitted exponents, and where peers cross.

A sweep is the rows of a set `growth-<size>` that differ in that size alone. Its exponent p is of time ~ size^p, by
least squares of logarithms over the upper half of the sizes: below, what a call costs whatever its size bends the line.
A crossover is a size between two neighbours of which ours is the faster at one and the peer at the other, both by their
whole intervals: where the ratio is 1 on the line through both.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, NamedTuple

from .cases import Case, LayerCase
from .decoder_cases import AttentionCase, DecoderCase
from .entry import Entry, Pairs
from .peers import PEERS
from .results import Ratio, Report, Row
from .tables import Table

__all__ = ["AXES", "GROWTH_SETS", "Fit", "Sweep", "crossovers", "fit", "growth_table", "sweeps"]

AXES = {"growth-T": "T", "growth-S": "S", "growth-B": "B", "growth-H": "H", "growth-layers": "layers",
        "growth-threads": "threads"}  # fmt: skip
ONE = (1,)  # thread


class Fit(NamedTuple):
    """time ~ size^exponent, and the standard error of the exponent."""

    exponent: float
    error: float


class Sweep(NamedTuple):
    """Rows that differ in one size alone, in its order."""

    axis: str
    name: str  # of the case, with the size left open
    sizes: tuple[int, ...]
    rows: tuple[Row, ...]


def _sweep(axis: str, case: Any, sizes: Sequence[int], *peers: str) -> list[Entry]:
    """Entries of `case` at each of the sizes; inputs are as wide as states."""
    pairs: Pairs = tuple(product(("auto",), peers))
    wide = isinstance(case, LayerCase) and axis == "H"
    cases = [replace(case, **{axis: n}, **({"I": n} if wide else {})) for n in sizes]
    return [Entry(f"growth-{axis}", c, pairs, ONE) for c in cases]


def _entries() -> list[Entry]:
    found = []
    for op, mode in product(("lstm", "gru"), ("forward", "train")):
        layer = LayerCase(op, mode, 50, 8, 128, 128)
        found += _sweep("T", layer, (1, 4, 16, 64, 256, 1024), "torch.nn")
        found += _sweep("B", layer, (1, 2, 4, 8, 16, 32, 64, 128, 256), "torch.nn")
        found += _sweep("H", replace(layer, T=20), (16, 32, 64, 128, 256, 512, 1024), "torch.nn")
        found += _sweep("layers", layer, (1, 2, 4, 8), "torch.nn")
        threads = replace(layer, B=64, I=256, H=256)
        found += [Entry("growth-threads", threads, (("auto", "torch.nn"),), (1, 2))]
    decoder = DecoderCase("bahdanau", "lstm", "train", 20, 20, 16, 128)
    found += _sweep("T", decoder, (5, 10, 20, 40, 80), "loop")
    found += _sweep("S", decoder, (5, 10, 20, 40, 80, 160), "loop")
    found += _sweep("B", decoder, (1, 4, 16, 64), "loop")
    found += _sweep("H", decoder, (32, 64, 128, 256, 512), "loop")
    attention = AttentionCase("additive", "train", 20, 20, 16, 128)
    found += _sweep("S", attention, (10, 40, 160, 640), "plain")
    return found


GROWTH_SETS: dict[str, tuple[Entry, ...]] = {
    name: tuple(entry for entry in _entries() if entry.set == name) for name in AXES
}


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """Of two sizes at least."""
    groups: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.set in AXES:
            axis = AXES[row.set]
            size = row.threads if axis == "threads" else getattr(row.case, axis)
            groups[axis, _name(row.case, axis)][size] = row
    return [
        Sweep(axis, name, tuple(sorted(found)), tuple(found[n] for n in sorted(found)))
        for (axis, name), found in groups.items()
        if len(found) > 1
    ]


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Over the upper half of the sizes, three at least where there are so many; of two points without an error."""
    start = min(len(sizes) // 2, max(0, len(sizes) - 3))
    points = [(math.log(n), math.log(s)) for n, s in zip(sizes[start:], seconds[start:], strict=True)]
    x0, y0 = (math.fsum(column) / len(points) for column in zip(*points, strict=True))
    width = math.fsum((x - x0) ** 2 for x, _ in points)
    slope = math.fsum((x - x0) * (y - y0) for x, y in points) / width
    left = math.fsum((y - y0 - slope * (x - x0)) ** 2 for x, y in points)
    return Fit(slope, math.sqrt(left / (len(points) - 2) / width) if len(points) > 2 else math.nan)


def crossovers(sweep: Sweep, ours: str, peer: str) -> list[float]:
    """Sizes at which the peer's time is ours."""
    found = []
    points = [(n, r) for n, row in zip(sweep.sizes, sweep.rows, strict=True) if (r := _ratio(row, ours, peer))]
    for (below, a), (above, b) in pairwise((n, r) for n, r in points if r.low > 1 or r.high < 1):
        if (a.low > 1) != (b.low > 1):
            share = math.log(a.median) / (math.log(a.median) - math.log(b.median))
            found.append(below * (above / below) ** share)
    return found


def growth_table(report: Report) -> Table:
    """A line for each sweep and pair."""
    lines = []
    for sweep in sweeps(report.rows):
        for ours, peer in dict.fromkeys((r.ours, r.peer) for row in sweep.rows for r in row.ratios):
            rows = [(n, row) for n, row in zip(sweep.sizes, sweep.rows, strict=True) if _ratio(row, ours, peer)]
            if len(rows) > 1:
                lines.append(_line(sweep, [n for n, _ in rows], [row for _, row in rows], ours, peer))
    head = ("sweep", "sizes", "exponent", "over", "its exponent", "ratio, smallest to largest size", "crossover")
    return Table("growth of time with one size", head, lines)


def _line(sweep: Sweep, sizes: list[int], rows: list[Row], ours: str, peer: str) -> list[str]:
    exponents = [_shown(fit(sizes, [row.timings[name].median for row in rows])) for name in (ours, peer)]
    ratios = " ".join(f"{r.median:.2f}" for row in rows if (r := _ratio(row, ours, peer)))
    crossed = crossovers(sweep, ours, peer)
    where = ", ".join(f"{sweep.axis} = {n:.3g}" for n in crossed) or _nowhere(rows, ours, peer)
    shown = " ".join(map(str, sizes))
    return [sweep.name, shown, exponents[0], PEERS[peer].label, exponents[1], ratios, where]


def _nowhere(rows: Sequence[Row], ours: str, peer: str) -> str:
    """Who is the faster at all sizes."""
    ratios = [r for row in rows if (r := _ratio(row, ours, peer))]
    if all(r.low > 1 for r in ratios):
        return "none: ours is faster"
    return "none: the peer is faster" if all(r.high < 1 for r in ratios) else "none"


def _shown(found: Fit) -> str:
    error = "" if math.isnan(found.error) else f" ± {found.error:.2f}"
    return f"{found.exponent:.2f}{error}"


def _ratio(row: Row, ours: str, peer: str) -> Ratio | None:
    return next((r for r in row.ratios if (r.ours, r.peer) == (ours, peer)), None)


def _name(case: Case, axis: str) -> str:
    """The case's, with the size left open: the inputs' width goes with H."""
    if axis == "threads":
        return str(case)
    opened = {"T": "T", "S": "S", "B": "B", "H": "H", "layers": "L"}[axis]
    parts = [p for p in str(case).split("-") if not _is_size(p, opened) and not (axis == "H" and _is_size(p, "I"))]
    return f"{'-'.join(parts)} by {axis}"


def _is_size(part: str, letter: str) -> bool:
    return part.startswith(letter) and part[len(letter) :].isdecimal()
