"""`python -m benchmarks run`: rows as they come, each on the disk before the next; at the end the tables."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch

from . import ceilings
from .end_to_end import TRIALS, train
from .machine import describe
from .progress import Progress
from .registry import SETS, Entry
from .report import print_report, row_line
from .results import SCHEMA, Journal, Recipe, Report, Row
from .runner import Runner
from .timing import Effort
from .trust import disturbed

__all__ = ["IN_DOUBT", "ROWLESS", "run"]

IMPORT_SETS, RECIPE_SETS = ("import", "full"), ("recipes", "full")  # in which there is what is no row
ROWLESS = {*IMPORT_SETS, *RECIPE_SETS}
SECOND_CHANCE_S = 240.0  # for all disturbed rows together
FAST = Effort(seconds=0.3, least=3, most=15)
SAME = ("cpu", "isa", "torch", "onnxruntime", "fastseq", "effort")  # of the environments of a run that goes on
IN_DOUBT = 4  # exit status
Work = tuple[Entry, int]


def run(options: argparse.Namespace, entries: Sequence[Entry], command: str) -> int:
    """Measure, print rows as they come and tables at the end; the exit status."""
    effort = FAST if options.fast else Effort()
    if options.seconds is not None:
        effort = replace(effort, seconds=options.seconds, most=sys.maxsize)
    runner = Runner(effort, set(options.peers))
    wanted = dict.fromkeys([*(() if options.fast else SETS["self"]), *entries])
    work = [(entry, n) for entry in wanted for n in entry.threads or options.threads]
    asked = set(options.set)
    told = {"effort": f"{effort.seconds:g} s a row", "command": command}
    before, environment = torch.get_num_threads(), describe() | told
    file, earlier = _file(options), _earlier(options, environment)
    with Journal(file, environment, earlier is not None) as journal:
        tops = [] if earlier is None else earlier.ceilings
        tops += _ceilings(runner, work)
        for top in tops:
            journal.ceiling(top)
        rows = _measure(runner, work, journal, earlier, 0.0 if options.fast else SECOND_CHANCE_S)
        tops = ceilings.best_of([*tops, *_ceilings(runner, work)])  # the machine may have been busy at first
        torch.set_num_threads(before)
        for top in tops:
            journal.ceiling(top)
        recipes = _recipes(runner, journal, earlier, max(options.threads)) if asked & {*RECIPE_SETS} else []
        import_s = runner.import_time() if asked & {*IMPORT_SETS} else None
        journal.end(runner.absent, import_s)
    runner.watch.save()
    report = Report(environment, tops, runner.absent, rows, import_s, recipes)
    return 0 if print_report(report, not options.summary, options.noisy) else IN_DOUBT


def _ceilings(runner: Runner, work: Sequence[Work]) -> list[ceilings.Ceiling]:
    """Of every device, dtype and number of threads that the rows have and this machine can run."""
    able = [(entry.case, n) for entry, n in work if entry.case.unavailable() is None]
    found = []
    for device in sorted({case.device for case, _ in able}):
        here = [(case, n) for case, n in able if case.device == device]
        dtypes = sorted({"bfloat16" if case.dtype == "autocast" else case.dtype for case, _ in here})
        found += runner.ceilings(dtypes, sorted({n for _, n in here}), device)
    return found


def _file(options: argparse.Namespace) -> Path | None:
    return None if options.out is None else Path(options.out)


def _earlier(options: argparse.Namespace, environment: dict[str, str]) -> Report | None:
    """What a run that was cut short left in the file, where this one goes on. ValueError where that was another run."""
    file = _file(options)
    if not options.resume or file is None or not file.exists():
        return None
    found = Report.load(file)
    if not file.read_text().startswith('{"schema"'):
        raise ValueError(f"{file}: of an earlier schema; --resume goes on with files of schema {SCHEMA}")
    then = found.environment
    other = [f"{n} {then.get(n)}, now {environment[n]}" for n in SAME if then.get(n) != environment[n]]
    if other:
        raise ValueError(f"{file}: another run, with {'; '.join(other)}: name another file, or leave --resume out")
    return found


def _measure(
    runner: Runner, work: Sequence[Work], journal: Journal, earlier: Report | None, second_chance_s: float
) -> list[Row]:
    """Every row, printed as it comes; disturbed ones are measured again at the end, while the time for that lasts."""
    rows = {} if earlier is None else {row.key: row for row in earlier.rows}
    begin, end = time.monotonic(), math.inf
    for again in (False, True):
        todo = [w for w in work if (_key(w) in rows and disturbed(rows[_key(w)]) if again else _key(w) not in rows)]
        todo.sort(key=lambda w: rows[_key(w)].calm or 0.0 if again else 0.0)  # the most disturbed first
        with Progress(len(todo)) as told:
            for entry, threads in todo:
                row = runner.row(entry, threads) if time.monotonic() < end else None
                if row is not None:
                    rows[row.key] = max(rows.get(row.key, row), row, key=attrgetter("calm"))
                    journal.row(rows[row.key])
                told(None if row is None else f"{time.monotonic() - begin:5.0f} s  {row_line(row)}")
        end = time.monotonic() + second_chance_s
    return list(rows.values())


def _recipes(runner: Runner, journal: Journal, earlier: Report | None, threads: int) -> list[Recipe]:
    """Every training that there is data for."""
    found = [] if earlier is None else list(earlier.recipes)
    known = {recipe.name for recipe in found}
    for trial in TRIALS:
        reason = trial.unavailable()
        if reason is not None:
            runner.absent[f"recipe {trial.name}"] = reason
        elif trial.name not in known:
            found.append(train(trial, threads, said=lambda line: print(line, file=sys.stderr, flush=True)))
            journal.recipe(found[-1])
    return found


def _key(work: Work) -> tuple[str, ...]:
    entry, threads = work
    return entry.set, str(entry.case), str(threads), entry.measure
