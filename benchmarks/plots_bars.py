"""Decoders beside what is promised of them."""

from collections import defaultdict
from typing import NamedTuple

from .decoder_cases import DecoderCase
from .peers import PEERS
from .plots import INK, MUTED, SERIES, Canvas, Plot, Tips, below, letters_on
from .report import interval
from .results import Ratio, Report, Row
from .targets import MODES, promised

__all__ = ["decoders"]

PEER = "loop"
BETWEEN = 0.24  # of a shape's place, left empty
LEAST = 4  # shapes, and decoders, that there is room for
SIZE = (6.0, 3.0)  # inches


class Bar(NamedTuple):
    """One ratio."""

    row: Row
    ratio: Ratio
    promise: float | None


def decoders(report: Report) -> list[Plot]:
    """Forward and training at full lengths on one thread, as `auto` runs them."""
    bars: dict[str, dict[str, dict[str, Bar]]] = defaultdict(lambda: defaultdict(dict))  # by mode, decoder, shape
    for row in report.rows:
        case = row.case
        if row.set == "decoder" and isinstance(case, DecoderCase) and (case.rows, row.threads) == ("full", 1):
            for ratio in row.ratios:
                if (ratio.ours, ratio.peer) == ("auto", PEER):
                    name = f"{case.attention.capitalize()} {case.cell.upper()}"
                    shape = f"B={case.B} H={case.H}\nS={case.S} T={case.T}"
                    bars[case.mode][name][shape] = Bar(row, ratio, promised(row, ratio))
    return [_plot(mode, kinds) for mode, kinds in bars.items()]


def _plot(mode: str, kinds: dict[str, dict[str, Bar]]) -> Plot:
    shapes = list(dict.fromkeys(shape for found in kinds.values() for shape in found))
    wide = (1 - BETWEEN) / max(len(kinds), LEAST)

    def draw(canvas: Canvas) -> Tips:
        axes = canvas.add_subplot()
        tips: dict[str, list[str]] = {}
        for k, (name, found) in enumerate(kinds.items()):
            at = {shapes.index(shape) + (k - (len(kinds) - 1) / 2) * wide: bar for shape, bar in found.items()}
            axes.bar([*at], [bar.ratio.median for bar in at.values()], wide * 0.9, color=SERIES[k], label=name)
            for x, bar in at.items():
                text = f"{bar.ratio.median:.1f}"
                axes.text(x, 0.12, text, ha="center", va="bottom", fontsize=8, color=letters_on(SERIES[k]))
            told = [(x, bar, bar.promise) for x, bar in at.items() if bar.promise is not None]
            if told:
                across, _, up = zip(*told, strict=True)
                label = "_" if tips else "promised"
                axes.scatter(
                    across, up, s=70, marker="_", color=INK, linewidths=1.3, label=label, gid=f"p{k}", zorder=3
                )
                tips[f"p{k}"] = [f"{b.row.name}: {interval(b.ratio)}, promised {promise:g}" for _, b, promise in told]
        axes.axhline(1, color=MUTED, linewidth=1)
        below(axes, shapes)
        axes.set(xlim=(-0.6, max(len(shapes), LEAST) - 0.4), ylabel=f"{PEERS[PEER].label}'s time over ours")
        axes.grid(visible=False, axis="x")
        canvas.legend(loc="outside lower left", ncols=5, handlelength=1, columnspacing=1.0)
        return tips

    return Plot(f"Attention decoders, {MODES[mode]}, 1 thread", SIZE, draw)
