"""What a run comes to: the tables of the README, also printed at the end of a run."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from .cases import Case
from .decoder_cases import DecoderCase
from .end_to_end import recipe_table
from .generate_cases import GenerateCase
from .growth import AXES, growth_table
from .heldout import heldout_table
from .peers import PEERS, SHOWN
from .results import Ratio, Report, Row
from .roofline import bound
from .stats import geometric_mean
from .tables import Table
from .targets import MODES, TARGETS, group, promised
from .trust import disturbed

__all__ = ["group_table", "promise", "ratios_of", "summaries", "under"]

NEARLY = 0.95  # of the machine's bound: a promise that needs more is named
OWN_TABLE = {"decoder", "corpus", "generate", "self", "heldout", *AXES}
ABOUT = {"bahdanau": "Bahdanau", "luong": "Luong, input feeding"}


def summaries(report: Report) -> list[Table]:
    """All that have lines: under `auto`; with the kernels forced, and frozen, the lines that are others. Of disturbed
    rows nothing.
    """
    report = replace(report, rows=[row for row in report.rows if not disturbed(row)])
    found: list[Table] = []
    for make in (group_table, decoder_table, generate_table, corpus_table):
        known: list[Sequence[str]] = []
        for ours in SHOWN:
            table = make(report, ours)
            lines = [line for line in table.lines if line not in known]
            same = len(lines) < len(table.lines)
            found.append(
                replace(table, title=f"{table.title}, {under(ours)}{' otherwise' if same else ''}", lines=lines)
            )
            known += lines
    found += [make(report) for make in (growth_table, heldout_table, recipe_table)]
    return [table for table in found if table.lines]


def under(ours: str) -> str:
    return {"auto": "under auto", "frozen": "frozen"}.get(ours, f'with backend="{ours}"')


def group_table(report: Report, ours: str) -> Table:
    """Geometric mean and minimum of each group, for each number of threads and for all, beside the target."""
    groups: dict[str, list[tuple[Row, float]]] = defaultdict(list)
    for row in report.rows:
        if _own_table(row) is None:
            for ratio in ratios_of(row, ours):
                groups[group(row, ratio)].append((row, ratio.median))
    threads = sorted({row.threads for members in groups.values() for row, _ in members})
    counts: list[Callable[[Row], bool]] = [lambda row, n=n: row.threads == n for n in threads]  # type: ignore[misc]
    heads = [_threads(n) for n in threads]
    if len(threads) > 1:
        counts, heads = [*counts, lambda row: True], [*heads, "all"]
    lines = [
        [name, str(len(members)), *(_mean(v for row, v in members if of(row)) for of in counts), _target(name, members)]
        for name, members in groups.items()
    ]
    return Table(
        "geometric mean and minimum of the peer's time, or memory, over ours",
        ("group", "rows", *heads, "target"),
        lines,
    )


def decoder_table(report: Report, ours: str) -> Table:
    """A line for each decoder, a column for each shape."""

    def place(case: Case) -> Place:
        assert isinstance(case, DecoderCase)
        shape = f"B={case.B} H={case.H} S=T={case.T}" if case.S == case.T else f"B={case.B} H={case.H}"
        return Place(f"{ABOUT[case.attention]}, {case.cell.upper()}, {MODES[case.mode]}", case.rows, shape)

    return _shapes_table(report, ours, "decoder", place, "decoders: the peer's time over ours", ("decoder", "sources"))


def generate_table(report: Report, ours: str) -> Table:
    """A line for each search, a column for each shape."""

    def place(case: Case) -> Place:
        assert isinstance(case, GenerateCase)
        search = "greedy" if case.beams == 1 else f"beam {case.beams}"
        name = f"{ABOUT[case.attention]}, {case.cell.upper()}, {search}"
        return Place(name, str(case.V), f"B={case.B} H={case.H} S={case.S} T={case.T}")

    return _shapes_table(report, ours, "generate", place, "generate: the peer's time over ours", ("search", "V"))


def corpus_table(report: Report, ours: str) -> Table:
    """Target tokens per second on real batches."""
    lines = []
    for row in report.rows:
        for ratio in ratios_of(row, ours) if _own_table(row) == "corpus" else ():
            speeds = [f"{row.case.tokens / row.timings[name].median:,.0f}" for name in (ours, ratio.peer)]
            lines.append([str(row.case), str(row.threads), *speeds, PEERS[ratio.peer].label, f"{ratio.median:.2f}"])
    head = ("decoder", "threads", "fastseq", "peer", "which is", "ratio")
    return Table("Multi30k: target tokens/s of training steps", head, lines)


class Place(NamedTuple):
    """Where a case's ratios stand."""

    name: str
    about: str
    shape: str


def _shapes_table(
    report: Report, ours: str, of: str, place: Callable[[Case], Place], title: str, heads: tuple[str, str]
) -> Table:
    """The rows of set `of` by shape: each ratio beside what is promised of it. heads: of `Place`'s name and about."""
    cells: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in report.rows:
        if _own_table(row) == of:
            at = place(row.case)
            for ratio in ratios_of(row, ours):
                line = at.name, PEERS[ratio.peer].label, at.about, str(row.threads)
                cells[line][at.shape] = f"{ratio.median:.2f}{_in_brackets(promise(report, row, ratio))}"
    shapes = list(dict.fromkeys(shape for line in cells.values() for shape in line))
    lines = [[*line, *(found.get(shape, "") for shape in shapes)] for line, found in cells.items()]
    return Table(title, (heads[0], "over", heads[1], "threads", *shapes), lines)


def ratios_of(row: Row, ours: str) -> list[Ratio]:
    return [ratio for ratio in row.ratios if ratio.ours == ours]


def promise(report: Report, row: Row, ratio: Ratio) -> str:
    """What is promised of this ratio, whether it is missed, and whether the machine could hardly do it."""
    target, least = promised(row, ratio), bound(row.case, row.threads, report.ceilings)
    if target is None:
        return ""
    words = [f"target {target:g}", *(["missed"] if ratio.median < target else [])]
    if least is not None:
        share = target * least.seconds / row.timings[ratio.peer].median
        words += [f"needs {share * 100:.0f} % of the bound"] if share > NEARLY else []
    return ", ".join(words)


def _own_table(row: Row) -> str | None:
    """The set, where its rows have a table of their own, or none."""
    return row.set if row.set in OWN_TABLE else None


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{geometric_mean(known):.2f}, min {min(known):.2f}" if known else ""


def _target(name: str, members: Sequence[tuple[Row, float]]) -> str:
    target = TARGETS.get(name)
    if target is None:
        return ""
    worst, least = min(members, key=lambda member: member[1])
    words = []
    if target.mean is not None:
        missed = geometric_mean([v for _, v in members]) < target.mean
        words.append(f"{target.mean:.3g}{' (missed)' if missed else ''}")
    if target.least is not None:
        words.append(f"min {target.least:.3g}{f' (missed: {worst.name})' if least < target.least else ''}")
    return ", ".join(words)
