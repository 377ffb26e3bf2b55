"""python -m benchmarks.foreign: see the package's docstring."""

import argparse
import sys
from pathlib import Path

from ..machine import describe
from . import docs
from .measure import ROOT, Fault, measure
from .packages import PROGRAMS
from .results import Report, Row, newest

PYTHON = ROOT / "build" / "foreign-venv" / "bin" / "python"


def main() -> int:
    """0, or 1 where a program fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.foreign")
    parser.add_argument("--only", action="append", choices=list(PROGRAMS), help="this program; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of either side (default: 15)")
    parser.add_argument(
        "--python", type=Path, default=PYTHON, help="has requirements.txt installed (default: make foreign's)"
    )
    parser.add_argument("--json", type=Path, help="write the results here; a file keeps its rows of other programs")
    parser.add_argument(
        "--write-docs", action="store_true", help="only the table of docs/replace.md, from the newest results"
    )
    asked = parser.parse_args()
    if asked.write_docs:
        docs.write(Report.from_json(newest().read_text()))
        return 0
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}: at least 1")
    if not asked.python.exists():
        parser.error(f"{asked.python} does not exist: make foreign, or name a Python with --python")
    return _run(asked.only or list(PROGRAMS), asked.python, asked.rounds, asked.json)


def _run(names: list[str], python: Path, rounds: int, path: Path | None) -> int:
    command = f"python -m benchmarks.foreign --rounds {rounds}"
    environment = describe() | {"command": command}
    rows = [_measured(name, python, rounds) for name in names]
    report = Report(environment, [row for row in rows if row is not None])
    if path is not None:
        before = Report.from_json(path.read_text()).rows if path.exists() else []
        path.write_text(report.with_others_of(before).to_json() + "\n")
    return int(None in rows)


def _measured(name: str, python: Path, rounds: int) -> Row | None:
    """A row, printed; None, with the reason printed, of a program that failed: the others are worth measuring."""
    try:
        row = measure(name, python, rounds)
    except Fault as fault:
        print(f"{name}: {fault}", file=sys.stderr)
        return None
    print(docs.line(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
