"""Whether a run may be reported: on a machine that others share, some are not worth their tables."""

from collections.abc import Iterator, Sequence

from .ceilings import Ceiling
from .peers import PEERS
from .results import Ratio, Report, Row
from .roofline import bound

__all__ = ["AGAIN", "MOST_DISTURBED", "SLACK", "disturbed", "doubts", "selves"]

AGAIN = ".again"  # the name of a contender that is another one, built and measured once more
RARELY = 0.2  # of a row's rounds: fewer calm ones, and the row is disturbed, too
MOST_DISTURBED = 0.2  # of the rows
MOST_ABOVE, NEARLY = 0.02, 0.9  # of the rows, whose medians are below so much of the bound
WIDE = 1.25  # an interval's upper end over its lower: in it any ratio is one
SLACK = 0.01  # by which an interval may miss 1: addresses differ, and with them what caches hold


def disturbed(row: Row) -> bool:
    """Somebody else slowed so many of its rounds that they are among what was measured."""
    return row.mixed or (row.calm is not None and row.calm < RARELY)


def doubts(report: Report) -> list[str]:
    """Reasons not to report the run; none is needed."""
    found = [] if report.ended else ["it was cut short; --resume goes on"]
    noisy, timed = sum(map(disturbed, report.rows)), [row for row in report.rows if row.measure != "memory"]
    if noisy > MOST_DISTURBED * len(timed):
        found.append(
            f"{noisy} of {len(timed)} rows were disturbed: other programs, or other machines on this CPU, slowed them"
        )
    above = [row.name for row in timed if _above_bound(row, report.ceilings)]
    if len(above) > MOST_ABOVE * len(timed):
        found.append(
            f"{len(above)} of {len(timed)} rows were faster than the machine's bound, so that something slowed it while"
            f" its ceilings were measured: {', '.join(above[:3])}"
        )
    wrong = [(row, ratio) for row, ratio in selves(report.rows) if not _is_one(ratio)]
    found += [
        f"{PEERS[ratio.ours].label} against itself came out as {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}],"
        f" {'which says little' if _reaches_one(ratio) else 'not as 1'}: {row.name}"
        for row, ratio in wrong
    ]
    return found


def _above_bound(row: Row, ceilings: Sequence[Ceiling]) -> bool:
    least = bound(row.case, row.threads, ceilings, row.measure == "cold")
    return least is not None and any(t.median < NEARLY * least.seconds for t in row.timings.values())


def selves(rows: Sequence[Row]) -> Iterator[tuple[Row, Ratio]]:
    """Every comparison of a contender with itself."""
    return ((row, ratio) for row in rows for ratio in row.ratios if ratio.peer == ratio.ours + AGAIN)


def _is_one(ratio: Ratio) -> bool:
    return _reaches_one(ratio) and ratio.high <= WIDE * ratio.low


def _reaches_one(ratio: Ratio) -> bool:
    return ratio.low <= 1 + SLACK and ratio.high >= 1 - SLACK
