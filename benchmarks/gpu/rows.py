"""The process that measures rows, one JSON line each: `python -m benchmarks.gpu.rows FILE SKIP SECONDS [--rehearse]`.

A fault on a GPU poisons its process, and a hanging kernel hangs it. So the stage starts this one again behind the row
that it died of, and every line is on the disk before the next row begins.
"""

import argparse
import faulthandler
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..machine import describe
from ..peers import PEERS
from ..registry import Entry
from ..report import row_line
from ..results import row_to_dict
from ..runner import Runner
from ..timing import Effort
from .sets import IN_ORDER, rehearsed

__all__ = ["main", "measure", "rows_of"]

EFFORT = Effort(seconds=0.4, least=5, most=31, patience=1.0)
HANGS_S = 90.0  # a row that takes so long hangs, and the process ends itself
COMPILING_S = 60.0  # that must be left for a row that torch.compile makes ready
POISONED = 3  # exit status: a later row would fail for this one's reason


def rows_of(rehearse: bool) -> tuple[Entry, ...]:
    """All rows in the order of importance; in rehearsal each kind of row once."""
    if not rehearse:
        return IN_ORDER
    return tuple({(e.set, e.case.mode): rehearsed(e) for e in reversed(IN_ORDER)}.values())[::-1]


def measure(runner: Runner, entry: Entry) -> dict[str, Any]:
    """One line: the row, or why there is none."""
    runner.absent.clear()
    begin = time.monotonic()
    line: dict[str, Any] = {"name": str(entry.case), "set": entry.set}
    try:
        row = runner.row(entry, 1)
    except Exception as error:  # whatever it is, the next row is wanted too
        line |= {"error": f"{type(error).__name__}: {error}"}
    else:
        line |= {"left_out": dict(runner.absent)} if row is None else {"row": row_to_dict(row), "text": row_line(row)}
        if runner.absent:
            line["left_out"] = dict(runner.absent)
    return line | {"seconds": time.monotonic() - begin}


def main(arguments: list[str]) -> int:
    """Measure from row `skip` on until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.rows", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("skip", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    runner = Runner(EFFORT, set(PEERS), lenient=True)
    with options.file.open("a") as file:
        if options.skip == 0:
            print(json.dumps({"environment": describe()}), file=file, flush=True)
        for entry in rows_of(options.rehearse)[options.skip :]:
            left = end - time.monotonic()
            if left <= 0:
                break
            slow = entry.set == "gpu-compiled"  # torch.compile of 64 steps takes minutes: it may have all that is left
            faulthandler.dump_traceback_later(left + HANGS_S if slow else HANGS_S, exit=True)
            if slow and left < COMPILING_S:
                line: dict[str, Any] = {
                    "name": str(entry.case),
                    "set": entry.set,
                    "left_out": {"time": "too little left"},
                }
            else:
                line = measure(runner, entry)
            print(json.dumps(line), file=file, flush=True)
            print(
                line.get("text") or f"{line['set']} {line['name']}: {line.get('error') or line['left_out']}", flush=True
            )
            if "error" in line and _poisoned():
                return POISONED
    faulthandler.cancel_dump_traceback_later()
    return 0


def _poisoned() -> bool:
    """Whether this process' GPU answers no more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
