"""How long calls and rows would take on a nominal machine: which are too long for a run, and how long a run will be."""

from collections.abc import Iterable, Sequence

from .cases import ITEMSIZE, Case
from .ceilings import MEMORY, Ceiling
from .entry import Entry
from .peers import OPT_IN
from .roofline import bound
from .timing import Effort

__all__ = ["call_seconds", "row_seconds", "total"]

FLOPS, BYTES, CACHE = 1e11, 2e10, 2**20  # a thread's products and loads, each second; bytes that it need not load again
BESIDE_S = 0.3  # of a row: its tensors, the checks, plans and the watch
CHILD_S = 3.0  # a process that measures memory
CHECKS = 6  # calls of a contender that are not timed: in float64 twice as long, in results, in plans


def call_seconds(case: Case, threads: int = 1) -> float:
    """The bound of one call; 0 on a GPU, of which nothing is assumed."""
    tops = [Ceiling(dtype, threads, FLOPS * threads, "") for dtype in ITEMSIZE]
    tops += [Ceiling("load", threads, BYTES * threads, "", size=size) for size in (CACHE, MEMORY)]
    least = bound(case, threads, tops)
    return 0.0 if least is None else least.seconds


def row_seconds(entry: Entry, threads: int) -> float:
    """Of a quiet machine."""
    names = {name for pair in entry.pairs for name in pair if not OPT_IN.intersection(pair)}
    contenders = len(names - {"auto"} if "cpu" in names else names)  # mostly one program
    if entry.measure == "memory":
        return 2 * CHILD_S * contenders
    round_s, effort = contenders * call_seconds(entry.case, threads), Effort()
    return BESIDE_S + CHECKS * round_s + max(effort.seconds, effort.least * round_s)


def total(entries: Sequence[Entry], threads: Iterable[int]) -> str:
    """Rows that this machine can run, and minutes; ceilings and a second chance for disturbed rows come on top."""
    able = [entry for entry in entries if entry.case.unavailable() is None]
    rows = [(entry, n) for entry in able for n in entry.threads or tuple(threads)]
    minutes = sum(row_seconds(entry, n) for entry, n in rows) / 60
    return f"{len(rows)} rows, about {minutes:.0f} minutes on a quiet machine"
