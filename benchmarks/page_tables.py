"""What a page tells in words and tables, as values: its template only lays them out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .peers import PEERS
from .report import interval, quantity, rates
from .results import Ratio, Report, Row
from .trust import disturbed, doubts, selves

__all__ = ["HEAD", "Cell", "Verdict", "all_rows", "verdict"]

HEAD = (
    "case", "threads", "over", "ratio [95 % interval]", "ours [20 %, 80 %]", "the peer [20 %, 80 %]", "of the bound",
    "GFLOP/s", "calm", "first call", "as", "ran", "set", "note",
)  # fmt: skip


class Verdict(NamedTuple):
    """Whether a run is to be trusted."""

    level: str  # "good" | "doubt" | "unknown"
    words: str
    reasons: Sequence[str] = ()


class Cell(NamedTuple):
    """Of the table of all rows."""

    text: str
    value: float | None = None  # what it is sorted by, unless its text begins with that
    kind: str = ""  # "faster" | "slower", where the whole interval is
    share: str = ""  # of the bound


def verdict(report: Report, noisy: bool) -> Verdict:
    """On top of the page; with `noisy`, what is in doubt is shown nevertheless."""
    found, count = doubts(report), sum(1 for _ in selves(report.rows))
    loud = sum(map(disturbed, report.rows))
    calm = f"{loud} of {len(report.rows)} rows were disturbed by others on this machine"
    if found:
        shown = "shown all the same" if noisy else "so its rows are not shown; run it again on a quiet machine"
        return Verdict("doubt", f"This run is in doubt, {shown}.", found)
    if count:
        return Verdict("good", f"Each of {count} contenders against itself came out as 1; {calm}.")
    return Verdict("unknown", f"No contender was measured against itself; {calm}.")


def all_rows(report: Report) -> list[list[Cell]]:
    """A line for each ratio; one for `auto` and `cpu` where they were one measurement."""
    return [line for row in report.rows for line in _lines(report, row)]


def _lines(report: Report, row: Row) -> Iterator[list[Cell]]:
    merged: dict[tuple[object, str], list[Ratio]] = {}
    for ratio in row.ratios:
        merged.setdefault((row.timings[ratio.ours], ratio.peer), []).append(ratio)
    for (_, peer), (ratio, *others) in merged.items():
        mine, theirs = row.timings[ratio.ours], row.timings[peer]
        _, gflops, share = rates(report, row, mine)
        yield [
            Cell(str(row.case)), Cell(str(row.threads)), Cell(PEERS[peer].label),
            Cell(interval(ratio), kind="faster" if ratio.low > 1 else "slower" if ratio.high < 1 else ""),
            Cell(quantity(mine, row), mine.median), Cell(quantity(theirs, row), theirs.median),
            Cell(share, share=share.partition(" ")[0]), Cell(gflops),
            Cell("" if row.calm is None else f"{row.calm:.0%}"),
            Cell(f"{mine.first:.2g} s" if mine.first else "", mine.first),
            Cell(", ".join(r.ours for r in (ratio, *others))), Cell(mine.backend), Cell(row.set),
            Cell("; ".join(filter(None, (row.measure if row.measure != "time" else "", mine.note, theirs.note)))),
        ]  # fmt: skip
