"""`python -m benchmarks run | report | list | tune`: fastseq beside its peers on this machine."""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from operator import attrgetter
from pathlib import Path

import torch

from . import ceilings, readme, tune
from .gpu.sets import GPU_SETS
from .machine import describe
from .registry import OPT_IN, PEERS, Entry
from .registry import SETS as CPU_SETS
from .report import disturbed, print_report, row_line
from .results import Report, Row
from .runner import Runner
from .timing import Effort

SETS = CPU_SETS | GPU_SETS
IMPORT_SETS = ("import", "full")  # of all the measurements, the one that is no row
SECOND_CHANCE_S = 240.0  # for all disturbed rows together
FAST = Effort(seconds=0.3, least=3, most=15)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        sys.exit(tune.main(arguments[1:]))
    options = _parser().parse_args(arguments)
    if options.command != "report":
        options.set = options.set or ["readme"]  # argparse would add to a default
    if options.command == "report":
        reports = [Report.from_json(Path(file).read_text()) for file in options.files]
        if options.readme:
            readme.write(Path(options.readme), reports)
        for report in reports:
            print_report(report, not options.summary)
    elif options.command == "list":
        print("\n".join(f"{e.set:<8} {e.case}" for e in _entries(options.set, options.rows)))
    else:
        where = ("--json", options.json, f"--json={options.json}")
        run(options, shlex.join(["python", "-m", "benchmarks", *(a for a in arguments if a not in where)]))


def run(options: argparse.Namespace, command: str) -> None:
    """Measure, print rows as they come and tables at the end, and write the JSON, `command` with it."""
    effort = FAST if options.fast else Effort()
    if options.seconds is not None:
        effort = replace(effort, seconds=options.seconds, most=sys.maxsize)
    entries = _entries(options.set, options.rows)
    _need_pairs(entries, options)
    runner = Runner(effort, set(options.peers))
    work = [(entry, n) for entry in entries for n in entry.threads or options.threads]
    threads = sorted({n for _, n in work})
    dtypes = sorted({"float32" if e.case.dtype == "float32" else "bfloat16" for e in entries})
    before = torch.get_num_threads()
    tops = runner.ceilings(dtypes, threads)
    rows = _measure(runner, work, 0.0 if options.fast else SECOND_CHANCE_S)
    tops = ceilings.best_of([*tops, *runner.ceilings(dtypes, threads)])  # the machine may have been busy at first
    torch.set_num_threads(before)
    import_s = runner.import_time() if set(options.set) & set(IMPORT_SETS) else None
    runner.watch.save()
    report = Report(describe() | {"command": command}, tops, runner.absent, rows, import_s)
    if options.json:
        Path(options.json).write_text(report.to_json() + "\n")
    print_report(report, not options.summary)


def _need_pairs(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Ends the run where nothing would be measured or compared."""
    if not entries and not set(options.set) & set(IMPORT_SETS):
        sets = [name for name in SETS if _entries([name], options.rows)]
        raise SystemExit(
            f"no case of --set {', '.join(options.set)} matches --rows; of other sets: {', '.join(sets) or 'none'}"
        )
    peers = set(options.peers)
    pairs = {pair for entry in entries for pair in entry.pairs}
    if pairs and not any(peers.issuperset(pair) for pair in pairs):
        ours, theirs = (", ".join(sorted(set(side))) for side in zip(*pairs, strict=True))
        raise SystemExit(
            f"--peers {','.join(sorted(peers))} compares nothing here; name one of {ours} and one of {theirs}"
        )


def _measure(runner: Runner, work: Sequence[tuple[Entry, int]], second_chance_s: float) -> list[Row]:
    """Every row, printed as it comes; disturbed ones are measured again at the end, while the time for that lasts."""
    rows: dict[tuple[Entry, int], Row] = {}
    begin, end = time.monotonic(), math.inf
    for again in (False, True):
        todo = [w for w in work if not again or (w in rows and disturbed(rows[w]))]
        for k, (entry, threads) in enumerate(todo):
            row = runner.row(entry, threads) if time.monotonic() < end else None
            if row is not None:
                rows[entry, threads] = max(rows.get((entry, threads), row), row, key=attrgetter("calm"))
                progress = f"{time.monotonic() - begin:5.0f} s {k + 1}/{len(todo)}"
                print(f"{progress}  {row_line(row)}", file=sys.stderr, flush=True)
        end = time.monotonic() + second_chance_s
    return list(rows.values())


def _entries(sets: Sequence[str], patterns: Sequence[str]) -> list[Entry]:
    """Those of the sets, each once, whose name matches one of the patterns."""
    entries = dict.fromkeys(entry for name in sets for entry in SETS[name])
    return [e for e in entries if not patterns or any(fnmatchcase(f"{e.set} {e.case}", f"*{p}*") for p in patterns)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure and print the tables")
    lists = commands.add_parser("list", help="name the cases")
    shows = commands.add_parser("report", help="print the tables of an earlier run")
    commands.add_parser(
        "tune", help="measure tile sizes and auto's crossovers on a GPU, and write them", add_help=False
    )
    for command in (runs, lists):
        command.add_argument("--set", action="append", choices=SETS, help="repeatable; default: readme")
        command.add_argument(
            "--rows", nargs="+", default=[], help="only cases that contain one of these (wildcards: * ?)"
        )
    runs.add_argument("--threads", type=_numbers, default=(1, 2), help="as in 1,2")
    runs.add_argument("--peers", type=_peers, default=set(PEERS) - OPT_IN, help=f"some of {', '.join(PEERS)}")
    runs.add_argument("--seconds", type=float, help=f"of measuring for each row; default {Effort.seconds}")
    runs.add_argument("--fast", action="store_true", help="a rough look: 0.3 s for each row, at least 3 rounds")
    runs.add_argument("--json", metavar="FILE", help="write the results")
    shows.add_argument("files", metavar="FILE", nargs="+", help="what --json wrote")
    shows.add_argument("--readme", metavar="README.md", help=f"write the tables between its {readme.BEGIN} markers")
    for command in (runs, shows):
        command.add_argument("--summary", action="store_true", help="summaries only, no rows")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    if not all(n.isdecimal() and int(n) > 0 for n in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}; numbers of threads, as in 1,2")
    return tuple(int(n) for n in text.split(","))


def _peers(text: str) -> set[str]:
    names = set(text.split(","))
    if names - PEERS.keys():
        raise argparse.ArgumentTypeError(f"{sorted(names - PEERS.keys())}: not among {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    main()
