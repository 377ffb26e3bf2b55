"""`gpu-bench`: rows in the order of importance, on the disk as they are measured, and a short table at the end."""

import json
import sys
from pathlib import Path
from typing import Any

from ..results import row_from_dict
from ..tables import print_table
from .build import TREE, built, environment
from .commands import Deadline, Record
from .rows import rows_of
from .tables import rows_table, sets_table

__all__ = ["bench", "read", "rows_command"]

RESERVE_S = 10.0  # for the table


def bench(record: Record, deadline: Deadline, rehearse: bool) -> None:
    """Processes one after another until all rows are done or the time is over; each begins behind the last line."""
    if not built(record, deadline):
        record.status, record.reason = "failed", record.reason or "nothing was built"
        return
    file = record.out / "bench.jsonl"
    file.unlink(missing_ok=True)
    lost = 0
    while deadline.left > RESERVE_S:
        before = len(read(file)[1])
        seconds = deadline.left - RESERVE_S
        command = rows_command(file, before, seconds, rehearse)
        step = record.run("rows", command, seconds + 5, TREE, environment(record), shown=True)
        if step.ok or step.rc is None:
            break
        lost += 1
        if len(read(file)[1]) == before:  # it died without a word: the row it was at is left out
            entry = rows_of(rehearse)[before]
            line = {
                "name": str(entry.case),
                "set": entry.set,
                "error": f"the process ended with {step.rc}, see rows.log",
            }
            with file.open("a") as lines:
                print(json.dumps(line), file=lines)
    environment_found, lines_found = read(file)
    record.environment = environment_found
    rows = [row_from_dict(line["row"]) for line in lines_found if "row" in line]
    record.found = {
        "rows": [line["row"] for line in lines_found if "row" in line],
        "first_and_total_seconds": {line["name"]: line.get("seconds") for line in lines_found},
        "errors": {line["name"]: line["error"] for line in lines_found if "error" in line},
        "left_out": {line["name"]: line["left_out"] for line in lines_found if "left_out" in line},
        "processes_lost": lost,
    }
    if not rows or record.found["errors"]:
        record.status = "failed"
        record.reason = f"{len(rows)} rows measured, {len(record.found['errors'])} failed"
    for name, value in environment_found.items():
        print(f"{name:<12} {value}")
    print_table(rows_table(rows))
    print_table(sets_table(rows))
    for name, error in record.found["errors"].items():
        print(f"failed: {name}: {error}")


def rows_command(file: Path, skip: int, seconds: float, rehearse: bool) -> list[str]:
    """The process that measures."""
    command = [sys.executable, "-m", "benchmarks.gpu.rows", str(file), str(skip), f"{seconds:.0f}"]
    return [*command, "--rehearse"] if rehearse else command


def read(file: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The environment and the rows' lines so far; a line that was cut short counts for nothing."""
    environment_found: dict[str, str] = {}
    lines: list[dict[str, Any]] = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "environment" in line:
            environment_found = line["environment"]
        else:
            lines.append(line)
    return environment_found, lines
