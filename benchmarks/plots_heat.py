"""Ratios as maps: of layers batch size by width, of decoders, searches and attention kind by shape."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.colors import Normalize

from .cases import Case, LayerCase
from .decoder_cases import AttentionCase, DecoderCase
from .generate_cases import GenerateCase
from .growth import AXES
from .peers import PEERS
from .plots import MUTED, Canvas, Plot, Tips, bare, below, in_words, letters_on
from .results import Report
from .targets import MODES

__all__ = ["FULL", "Grid", "drawn", "grids", "layers"]

COLOURS = colormaps["RdBu"]  # red: slower, blue: faster; told apart by colour-blind readers, too
ELSEWHERE = {"self", "heldout", *AXES}  # sets whose ratios make no map
FULL = 2.0  # log2 of the ratio that has the deepest colour
CELL, LETTER = (0.62, 0.33), 0.072  # inches of a cell, and of a letter beside it
LEAST = 2  # lines and columns of a map of layers


class Place(NamedTuple):
    """Of a case: the map, the line and the column."""

    what: str
    line: str
    column: str


class Grid(NamedTuple):
    """One map."""

    set: str
    what: str
    ours: str
    peer: str
    threads: int
    values: dict[tuple[str, str], float]  # by line and column

    @property
    def title(self) -> str:
        return f"{self.what}, over {PEERS[self.peer].label}, {in_words(self.threads)}"


def grids(report: Report, ours: str) -> list[Grid]:
    """Of ratios of `ours`: of layers all with two lines and columns at least; all of decoders, searches, attention."""
    found: dict[tuple[str, str, str, int], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in report.rows:
        place = None if row.set in ELSEWHERE else _place(row.case)
        for ratio in row.ratios if place is not None else ():
            if ratio.ours == ours and place is not None:
                what = place.what if row.measure == "time" else f"{place.what}, {row.measure}"
                found[row.set, what, ratio.peer, row.threads][place.line, place.column] = ratio.median
    made = [Grid(of, what, ours, peer, n, values) for (of, what, peer, n), values in found.items()]
    return [grid for grid in made if not grid.what.startswith(("LSTM", "GRU")) or min(map(len, _sides(grid))) >= LEAST]


def layers(report: Report) -> list[Plot]:
    """The README's: the grid of layers on one thread, as `auto` runs it."""
    return [drawn(grid) for grid in grids(report, "auto") if grid.set == "grid" and grid.threads == 1]


def drawn(grid: Grid) -> Plot:
    """Its picture: the values in cells, coloured by their logarithm around 1."""
    lines, columns = _sides(grid)
    left = LETTER * max(map(len, lines)) + 0.2
    size = left + CELL[0] * _wide(columns) * len(columns), CELL[1] * len(lines) + 0.25 + 0.15 * ("\n" in columns[0])

    def draw(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot()
        scale = Normalize(-FULL, FULL)
        bare(axes)
        for (line, column), value in grid.values.items():
            x, y = columns.index(column), lines.index(line)
            colour = COLOURS(scale(math.log2(value)))
            axes.fill_between([x - 0.485, x + 0.485], y - 0.46, y + 0.46, color=colour, linewidth=0)
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=letters_on(colour), fontsize=9)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(lines) - 0.5, -0.5))
        below(axes, columns)
        axes.set_yticks(range(len(lines)), lines)
        axes.tick_params(colors=MUTED, pad=2)
        return {}

    return Plot(grid.title, size, draw)


def _wide(columns: Sequence[str]) -> float:
    """Cells, as many letters need."""
    return max(1.0, max(len(part) for column in columns for part in column.split("\n")) * LETTER / CELL[0] + 0.1)


def _sides(grid: Grid) -> tuple[list[str], list[str]]:
    """Names of lines and columns, numbers in their order."""
    lines, columns = (list(dict.fromkeys(side)) for side in zip(*grid.values, strict=True))
    if grid.what.startswith(("LSTM", "GRU")):
        lines.sort(key=lambda name: int(name.partition("=")[2]))
        columns.sort(key=lambda name: int(name.partition("=")[2]))
    return lines, columns


def _place(case: Case) -> Place | None:
    """None where a map would not tell the cases apart."""
    if isinstance(case, LayerCase):
        return next(_layer_place(case), None)
    mode = MODES[case.mode]
    if isinstance(case, DecoderCase):
        return Place(f"decoders, {mode}", f"{_decoder(case)}{_rows(case.rows)}", _shape(case.B, case.H, case.S, case.T))
    if isinstance(case, GenerateCase):
        search = "greedy search" if case.beams == 1 else f"search by {case.beams} beams"
        return Place(search, f"{_decoder(case)}, V={case.V}", _shape(case.B, case.H, case.S, case.T))
    if isinstance(case, AttentionCase):
        return Place(f"attention, {mode}", f"{case.score}{_rows(case.rows)}", _shape(case.B, case.H, case.S, case.T))
    return None


def _layer_place(case: LayerCase) -> Iterator[Place]:
    if case.I == case.H:
        about = [
            f"{case.cell.upper()}{' cell' if case.is_cell else ''} {MODES[case.mode]}",
            *([case.dtype] if case.dtype != "float32" else []), *([case.rows] if case.rows != "full" else []),
            *([f"{case.layers} layers"] if case.layers > 1 else []), *(["bidirectional"] if case.bidirectional else []),
            *([f"T={case.T}"] if case.T > 1 else []),
        ]  # fmt: skip
        yield Place(", ".join(about), f"B={case.B}", f"H={case.H}")


def _decoder(case: DecoderCase | GenerateCase) -> str:
    return f"{case.attention.capitalize()} {case.cell.upper()}"


def _rows(rows: str) -> str:
    return "" if rows == "full" else f", {rows}"


def _shape(b: int, h: int, s: int, t: int) -> str:
    return f"B={b} H={h}\n{f'S=T={t}' if s == t else f'S={s} T={t}'}"
