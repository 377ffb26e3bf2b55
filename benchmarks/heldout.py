"""Whether `auto` chose well where nothing was tuned: shapes absent from the grid of `tune`, every backend in turns.

What a wrong choice costs is the time of auto's over the best backend's. Its upper 95 % bound is promised.
"""

from itertools import product

from .cases import LayerCase
from .decoder_cases import AttentionCase, DecoderCase
from .entry import Entry, Pairs
from .results import Report, Row
from .tables import Table

__all__ = ["HELDOUT", "PROMISED", "heldout_table", "upper"]

PROMISED = {"cpu": 1.05, "cuda": 1.02}
BACKENDS = ("cpu", "torch", "reference", "triton", "cuda")
PAIRS: Pairs = tuple(("auto", name) for name in BACKENDS)
SHAPES = ((1, 48), (1, 384), (3, 96), (20, 200), (48, 320), (100, 24))  # B, H


def _entries() -> list[Entry]:
    ops, modes = ("lstm", "gru"), ("forward", "train")
    cases: list[LayerCase] = [
        LayerCase(op, mode, t, b, 40, h) for op, mode, t, (b, h) in product(ops, modes, (33,), SHAPES)
    ]
    cases += [
        LayerCase(f"{op}_cell", mode, 1, b, 40, h, hx=True) for op, mode, (b, h) in product(ops, modes, SHAPES[:4])
    ]
    cases += [LayerCase(op, mode, 7, 12, 40, 160, 2, True, rows="lengths") for op, mode in product(ops, modes)]
    cases += [LayerCase(op, mode, 33, 20, 40, 200, dtype="bfloat16") for op, mode in product(ops, modes)]
    others = [DecoderCase(a, "gru", "train", 13, 11, 12, 96) for a in ("bahdanau", "luong")]
    attention = [AttentionCase("additive", mode, 23, 17, 12, 96) for mode in modes]
    return [Entry("heldout", case, PAIRS) for case in (*cases, *others, *attention)]


HELDOUT = tuple(_entries())


def upper(row: Row) -> tuple[float, str]:
    """The upper 95 % bound of auto's time over the best backend's, and which that is."""
    others = {r.peer: 1 / r.low for r in row.ratios if r.ours == "auto" and r.peer in BACKENDS}
    best = min(others, key=lambda name: row.timings[name].median)
    return max(1.0 if row.timings[best].backend == row.timings["auto"].backend else others[best], 1.0), best


def heldout_table(report: Report) -> Table:
    """Rows, wrong choices, and the worst of the bounds beside the promise."""
    lines = []
    rows = [row for row in report.rows if row.set == "heldout" and len(row.timings) > 1]
    for device in dict.fromkeys(row.case.device for row in rows):
        bounds = [(*upper(row), row) for row in rows if row.case.device == device]
        worst, best, row = max(bounds, key=lambda found: found[0])
        missed = sum(bound > PROMISED[device] for bound, _, _ in bounds)
        wrong = sum(row.timings[best].backend != row.timings["auto"].backend for _, best, row in bounds)
        target = f"{PROMISED[device]:g}{f' (missed by {missed} rows)' if missed else ''}"
        where = "" if worst == 1 else f"{row.name}: {best}"
        lines.append([device, str(len(bounds)), str(wrong), f"{worst:.3f}", where, target])
    head = ("device", "rows", "another was faster", "worst upper bound of auto / best", "at", "target")
    return Table("auto beside the best backend, on shapes that nothing was tuned on", head, lines)
