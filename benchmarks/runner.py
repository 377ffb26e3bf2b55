"""From entries of the registry to rows: build, check, then measure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from fastseq.dispatch import BACKENDS

from . import ceilings
from .calm import MEMORY, Watch
from .cases import Case
from .equality import Unequal, check, precision, truth_of
from .kinds import draw
from .peers import PEERS
from .problem import Problem
from .processes import import_seconds, memory_unavailable, peak_bytes
from .programs import NotRunnable, Results
from .registry import Entry, Pairs
from .results import Ratio, Row, Timing
from .stats import bootstrap, median, quantile
from .timing import Effort, Runnable, Samples, interleave

__all__ = ["Runner", "summarize"]

KERNELS = {*BACKENDS} - {"torch"}  # backends that are this project's own
IMPORTS = 7  # processes
MEMORY_ROUNDS = 2  # processes for each contender; the numbers hardly vary


@dataclass
class Runner:
    """Runs entries and remembers what was left out."""

    effort: Effort
    peers: set[str]  # the contenders to run
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why this machine has it not
    lenient: bool = False  # a peer that errs, which may be the peer's own rounding, is timed nevertheless, and told of

    def __post_init__(self) -> None:
        self.watch = Watch(MEMORY)
        for name in sorted(self.peers):
            reason = PEERS[name].unavailable()
            if reason is not None:
                self.absent[name] = reason

    def row(self, entry: Entry, threads: int) -> Row | None:
        """None where no pair can run."""
        lacking = entry.case.unavailable() or (memory_unavailable() if entry.measure == "memory" else None)
        if lacking is not None:
            self._note(f"some rows of set {entry.set}", lacking)
            return None
        pairs = tuple(pair for pair in entry.pairs if all(self._runs(name, entry.case) for name in pair))
        runnables, same_as = self._prepare(entry, _names(pairs), threads)
        if len(runnables) < 2:
            return None
        if entry.measure == "memory":
            taken = Samples(_peaks(entry.case, runnables), 1.0)
        else:
            watch = _always if entry.case.device == "cuda" else self.watch.calm
            taken = interleave(runnables, self.effort, watch)
        values = {name: taken.values[same] for name, same in same_as.items()}
        programs = {name: runnables[same].program for name, same in same_as.items()}
        timings = {name: summarize(values[name], p.backend, p.note, p.first) for name, p in programs.items()}
        ratios = _ratios(entry.case, pairs, values)
        return Row(entry.set, entry.case, threads, entry.measure, timings, ratios, taken.calm, taken.mixed)

    def import_time(self) -> Timing:
        """Of several fresh processes, what fastseq adds to torch."""
        return summarize([import_seconds() for _ in range(IMPORTS)], "import fastseq")

    def ceilings(self, dtypes: Iterable[str], threads: Iterable[int], device: str = "cpu") -> list[ceilings.Ceiling]:
        dtypes = tuple(dtypes)
        return [ceiling for n in threads for ceiling in ceilings.measure(dtypes, n, device)]

    def _runs(self, name: str, case: Case) -> bool:
        """Leaves a note where it could but refuses this case."""
        if name not in self.peers or name in self.absent:
            return False
        reason = PEERS[name].obstacle(case)
        if reason is not None:
            self._note(f"{name}, from some rows", reason)
        return reason is None

    def _note(self, what: str, reason: str) -> None:
        """Each reason once, however many rows it keeps out."""
        noted = self.absent.setdefault(what, reason)
        if reason not in noted:
            self.absent[what] = f"{noted}; {reason}"

    def _prepare(self, entry: Entry, names: Iterable[str], threads: int) -> tuple[dict[str, Runnable], dict[str, str]]:
        """Built and found equal; and for each contender the name of the runnable that is measured for it.

        `auto` is often the very program that another contender runs: that one is measured for both. An `again` is not.
        """
        runnables: dict[str, Runnable] = {}
        same_as: dict[str, str] = {}
        first: dict[tuple[str, Case, int], str] = {}
        for name in names:
            peer, case = PEERS[name], PEERS[name].form(entry.case)
            n = peer.threads or threads
            torch.set_num_threads(n)
            try:
                program = peer.build(_problem(case))
            except NotRunnable as reason:
                self._note(f"{name}, from some rows", str(reason))
                continue
            one = program.backend if peer.ours and not peer.again else f" {name}"
            same_as[name] = first.setdefault((one, case, n), name)
            if same_as[name] == name:
                try:
                    first_call = check(program, _truth(case), precision(case))
                    program = replace(program, first=program.first or first_call)
                except Unequal as error:
                    if not self.lenient or program.backend in KERNELS:
                        raise Unequal(f"{name}, {case}, threads={n}: {error}") from None
                    program = replace(program, note="; ".join(filter(None, (program.note, str(error)))))
                runnables[name] = Runnable(program, n, case.device, entry.measure == "cold")
        return runnables, same_as


def _always(threads: int) -> bool:
    """Whether somebody else slows the host matters little to a GPU."""
    return True


def summarize(values: list[float], backend: str, note: str = "", first: float = 0.0) -> Timing:
    """Median and quantiles."""
    return Timing(backend, median(values), quantile(values, 0.2), quantile(values, 0.8), len(values), note, first)


def _names(pairs: Pairs) -> list[str]:
    return list(dict.fromkeys(name for pair in pairs for name in pair))


def _peaks(case: Case, runnables: Mapping[str, Runnable]) -> dict[str, list[float]]:
    """Bytes, each from a process of its own."""
    return {n: [peak_bytes(case, n, r.threads) for _ in range(MEMORY_ROUNDS)] for n, r in runnables.items()}


def _ratios(case: Case, pairs: Pairs, samples: Mapping[str, list[float]]) -> tuple[Ratio, ...]:
    """peer / ours, round by round."""
    ratios = []
    for ours, peer in pairs:
        if ours in samples and peer in samples:
            scale = PEERS[peer].scale(case)
            paired = [scale * b / a for a, b in zip(samples[ours], samples[peer], strict=True)]
            ratios.append(Ratio(ours, peer, median(paired), *bootstrap(paired)))
    return tuple(ratios)


@lru_cache(maxsize=2)
def _problem(case: Case) -> Problem:
    return draw(case)


@lru_cache(maxsize=2)  # the same for every number of threads
def _truth(case: Case) -> Results:
    return truth_of(_problem(case))
