"""`python -m benchmarks run | report | compare | list | tune`: fastseq beside its peers on this machine."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from . import estimate, readme, tune
from .cited import cited_tables
from .compare import TOLERANCE, print_comparison
from .equality import Unequal
from .gpu.sets import GPU_SETS
from .peers import OPT_IN, PEERS
from .registry import SETS as CPU_SETS
from .registry import Entry
from .report import print_report
from .results import Report
from .run import IN_DOUBT, ROWLESS, run
from .timing import Effort

SETS = CPU_SETS | GPU_SETS
CPUS = os.cpu_count() or 1
WRONG = 3  # exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and do; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        return tune.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options, arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Unequal as error:
        print(f"not measured, since a contender is wrong: {error}", file=sys.stderr)
        return WRONG


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    options.set = options.set or ["readme"]  # argparse would add to a default
    if options.resume and options.out is None:
        raise ValueError("--resume goes on with the file that --out names; name one")
    entries = _entries(options.set, options.rows)
    _need_pairs(entries, options)
    where = ("--out", options.out, f"--out={options.out}", "--resume")
    return run(options, entries, shlex.join(["python", "-m", "benchmarks", *(a for a in arguments if a not in where)]))


def _list(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    entries = _entries(options.set or ["readme"], options.rows)
    print("\n".join(f"{e.set:<8} {e.case}" for e in entries))
    print(estimate.total(entries, options.threads), file=sys.stderr)
    return 0


def _report(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    reports = [Report.load(Path(file)) for file in options.files]
    if options.readme:
        readme.write(Path(options.readme), reports)
    if options.html or options.png:
        _draw(options, reports)
    printed = [print_report(report, not options.summary, options.noisy) for report in reports]
    return 0 if all(printed) else IN_DOUBT


def _draw(options: argparse.Namespace, reports: Sequence[Report]) -> None:
    try:
        from . import page
    except ImportError as error:
        raise ValueError(f"--html and --png need matplotlib and jinja2 ({error}): pip install -e '.[bench]'") from None
    if options.png:
        page.pictures(Path(options.png), reports)
    if options.html:
        page.write(Path(options.html), reports, options.noisy, cited_tables())


def _compare(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    before, after = (Report.load(Path(file)) for file in (options.before, options.after))
    return print_comparison(before, after, options.tolerance, options.noisy)


def _need_pairs(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Ends the run where nothing would be measured or compared."""
    if not entries and not set(options.set) & ROWLESS:
        sets = [name for name in SETS if _entries([name], options.rows)]
        raise SystemExit(
            f"no case of --set {', '.join(options.set)} matches --rows; of other sets: {', '.join(sets) or 'none'}"
        )
    lacking = [entry.case.unavailable() for entry in entries]
    if lacking and None not in lacking:
        raise SystemExit(f"no row of --set {', '.join(options.set)} can run here: {lacking[0]}")
    peers = set(options.peers)
    pairs = {pair for entry in entries for pair in entry.pairs}
    if pairs and not any(peers.issuperset(pair) for pair in pairs):
        ours, theirs = (", ".join(sorted(set(side))) for side in zip(*pairs, strict=True))
        raise SystemExit(
            f"--peers {','.join(sorted(peers))} compares nothing here; name one of {ours} and one of {theirs}"
        )


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
    compares = commands.add_parser("compare", help="what became slower between two runs; exit status 1 if anything did")
    commands.add_parser(
        "tune", help="measure tile sizes and auto's crossovers on a GPU, and write them", add_help=False
    )
    for command in (runs, lists):
        command.add_argument("--set", action="append", choices=SETS, help="repeatable; default: readme")
        command.add_argument("--threads", type=_numbers, default=_numbers("1,2" if CPUS > 1 else "1"), help="as in 1,2")
        command.add_argument(
            "--rows", nargs="+", default=[], help="only cases that contain one of these (wildcards: * ?)"
        )
    runs.add_argument("--peers", type=_peers, default=set(PEERS) - OPT_IN, help=f"some of {', '.join(PEERS)}")
    runs.add_argument("--seconds", type=_seconds, help=f"of measuring for each row; default {Effort.seconds}")
    runs.add_argument("--fast", action="store_true", help="a rough look: 0.3 s for each row, at least 3 rounds")
    runs.add_argument("--out", metavar="FILE.jsonl", help="write the results, each as it is made")
    runs.add_argument("--resume", action="store_true", help="go on where a run that wrote that file was cut short")
    shows.add_argument("files", metavar="FILE", nargs="+", help="what --out wrote")
    shows.add_argument("--readme", metavar="README.md", help=f"write the tables between its {readme.BEGIN} markers")
    shows.add_argument("--html", metavar="PAGE.html", help="write one page with plots and all rows")
    shows.add_argument("--png", metavar="DIR", help="write the README's pictures: layers, decoders, roofline")
    compares.add_argument("before", metavar="BEFORE", help="what --out wrote")
    compares.add_argument("after", metavar="AFTER")
    compares.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"share of a ratio; default {TOLERANCE}")
    for command in (runs, shows):
        command.add_argument("--summary", action="store_true", help="summaries only, no rows")
    for command in (runs, shows, compares):
        command.add_argument("--noisy", action="store_true", help="disturbed rows and runs in doubt, too")
    runs.set_defaults(run=_run)
    lists.set_defaults(run=_list)
    shows.set_defaults(run=_report)
    compares.set_defaults(run=_compare)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    if not all(n.isdecimal() and int(n) > 0 for n in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}; numbers of threads, as in 1,2")
    if max(numbers := tuple(int(n) for n in text.split(","))) > CPUS:
        raise argparse.ArgumentTypeError(f"{text!r}; this machine has {CPUS} CPUs")
    return numbers


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; seconds above 0")
    return value


def _peers(text: str) -> set[str]:
    names = set(text.split(","))
    if names - PEERS.keys():
        raise argparse.ArgumentTypeError(f"{sorted(names - PEERS.keys())}: not among {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
