"""The table of docs/modes.md, from the results of the tests: `make modes` rewrites it."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.modes.cases import BACKENDS, CASES, CELLS, Case, Mode
from tests.modes.modes import FAMILIES

__all__ = ["BEGIN", "END", "PAGE", "all_passed", "render", "table_of"]

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"
BEGIN, END = "<!-- modes:begin -->", "<!-- modes:end -->"
Results = Mapping[str, bool]  # "mode|cell|backend": whether every test of it passed


def key(mode: Mode, case: Case) -> str:
    return "|".join((mode.title, case.cell, case.backend))


def all_passed() -> Results:
    """What a run without failures gives."""
    return {key(mode, case): True for modes in FAMILIES.values() for mode in modes for case in CASES}


def render(results: Results) -> str:
    """Markdown; KeyError where a case of a mode has no result."""
    notes: list[str] = []
    head = ["", *(f"`{backend}`" for backend in BACKENDS)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for family, modes in FAMILIES.items():
        lines.append(f"| **{family}** |{' |' * len(BACKENDS)}")
        for mode in modes:
            row = [mode.title, *(_entry(mode, backend, results, notes) for backend in BACKENDS)]
            lines.append(f"| {' | '.join(row)} |")
    footnotes = [f"{number}. {note}." for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *footnotes])


def _entry(mode: Mode, backend: str, results: Results, notes: list[str]) -> str:
    """What a mode does on a backend, for all modules or for each kind of outcome."""
    outcomes: dict[str, list[str]] = {}
    for cell in CELLS:
        case = Case(cell, backend)
        limit = mode.limit(case)
        if not results[key(mode, case)]:
            outcome = "**fails**"
        elif limit is None:
            outcome = "yes"
        else:
            if limit.reason not in notes:
                notes.append(limit.reason)
            outcome = f"no ({notes.index(limit.reason) + 1})"
        outcomes.setdefault(outcome, []).append(cell)
    if len(outcomes) == 1:
        return next(iter(outcomes))
    parts = [f"{', '.join(cells)}: {outcome}" for outcome, cells in outcomes.items() if outcome != "yes"]
    return "; ".join([*parts, *(["others yes"] if "yes" in outcomes else [])])


def table_of(page: str) -> str:
    """The table that a page has."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def main(path: str) -> None:
    results: Results = json.loads(Path(path).read_text())
    page = PAGE.read_text()
    PAGE.write_text(page.replace(table_of(page), render(results)))
    failed = [name for name, passed in results.items() if not passed]
    sys.exit("\n".join(["these fail:", *failed]) if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1])
