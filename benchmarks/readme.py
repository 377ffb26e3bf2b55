"""The measured part of the README, from the JSON of runs: no figure there is typed by hand."""

import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .results import Report
from .summary import summaries
from .tables import markdown
from .trust import disturbed, doubts

__all__ = ["BEGIN", "END", "block", "write"]

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
WIDTH = 120
LONG = ("growth",)  # beginnings of titles of tables that are left to the page


def write(file: Path, reports: Iterable[Report]) -> None:
    """Replace what stands between the markers of `file`; ValueError unless each is there once, in this order, and for a
    run that is in doubt.
    """
    reports = list(reports)
    found_doubts = [doubt for report in reports for doubt in doubts(report)]
    if found_doubts:
        raise ValueError("not written, since a run is in doubt: " + "; ".join(found_doubts))
    text = file.read_text()
    found = text.count(BEGIN), text.count(END)
    if found != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{file} has {found[0]} {BEGIN} and {found[1]} {END}; it needs one of each, in this order")
    head, rest = text.split(BEGIN)
    file.write_text(f"{head}{BEGIN}\n{block(reports)}\n{END}{rest.split(END)[1]}")


def block(reports: Iterable[Report]) -> str:
    """Markdown: of each run where, when and how it was made, then its tables."""
    parts = []
    for report in reports:
        parts.append(textwrap.fill(_origin(report), WIDTH, break_long_words=False, break_on_hyphens=False))
        parts += [markdown(table) for table in summaries(report) if not table.title.startswith(LONG)]
    return "\n\n".join(parts)


def _origin(report: Report) -> str:
    e, ran = report.environment, Counter(r.timings["auto"].backend for r in report.rows if "auto" in r.timings)
    machine = f"{e['cpu']}, `{e['isa']}`, torch {e['torch']}, ONNX Runtime {e['onnxruntime']}, {e['date'][:10]}"
    command = f"; `{e['command']}`" if "command" in e else ""
    chosen = ", ".join(f"`{name}` in {count} of {ran.total()}" for name, count in ran.most_common())
    noisy = sum(map(disturbed, report.rows))
    return f"{machine}{command}. `auto` ran {chosen} rows; disturbed by other programs: {noisy}."
