"""Seconds per call of several programs, taken in turns so that drift of the machine meets them all alike."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import torch

from .programs import Program

__all__ = ["Effort", "Runnable", "Samples", "interleave"]

SAMPLE_S = 1e-3  # a sample is as many calls as last this long: the timer's noise is below 0.1 %
LONG_S = 20e-3  # a call so long hides what it costs to have caches and threads back
COLD_CALLS = 2  # of a sample with empty caches, each after its own flood
FLOOD = 2**28  # bytes: more than any cache of one CPU
SETTLE_S = 2e-3  # threads of one library spin for about this long after its call, on cores that the next one needs


@dataclass(frozen=True)
class Effort:
    """How long a row is measured: for `seconds`, but at least and at most so many calm rounds.

    Where the machine is disturbed it goes on for up to `patience` times as long, then takes the rounds as they are.
    """

    seconds: float = 1.0
    least: int = 5
    most: int = 51
    patience: float = 2.0


@dataclass(frozen=True)
class Runnable:
    """A program and the number of threads that it gets."""

    program: Program
    threads: int
    device: str = "cpu"  # "cuda": timed by events of its stream
    cold: bool = False  # caches are emptied before each call


@dataclass(frozen=True)
class Samples:
    """By contender; values with the same index are of the same round."""

    values: dict[str, list[float]]  # seconds per call, of the calm rounds, or of all where too few were calm
    calm: float  # the share of calm rounds among all
    mixed: bool = False  # the others are in `values`


Clock = Callable[[], int]  # nanoseconds


def interleave(
    runnables: Mapping[str, Runnable],
    effort: Effort,
    calm: Callable[[int], bool],  # is the machine, for so many threads? asked before and after each sample
    clock: Clock = time.perf_counter_ns,
) -> Samples:
    """Round robin, the order turned round each time."""
    plans = {name: _plan(r, clock) for name, r in runnables.items()}
    threads = max(r.threads for r in runnables.values())
    rounds: list[tuple[bool, dict[str, float]]] = []
    order, begin, kept = list(runnables), clock(), 0
    with _no_collection():
        while _more(effort, (clock() - begin) * 1e-9, kept, len(rounds)):
            values, quiet = {}, calm(threads)
            for name in order:
                values[name] = _sample(runnables[name], plans[name], clock)
                quiet = calm(threads) and quiet
            rounds.append((quiet, values))
            kept += quiet
            order.reverse()
    used = [values for quiet, values in rounds if quiet or kept < effort.least]
    values_of = {name: [values[name] for values in used] for name in runnables}
    return Samples(values_of, kept / len(rounds), kept < effort.least and kept < len(rounds))


def _more(effort: Effort, seconds: float, kept: int, done: int) -> bool:
    if kept >= effort.least:
        return kept < effort.most and seconds < effort.seconds
    return done < effort.least or seconds < effort.seconds * effort.patience


class _Plan(NamedTuple):
    """Of one sample: calls before it, and calls in it."""

    warm: int
    calls: int


def _plan(runnable: Runnable, clock: Clock) -> _Plan:
    """Warms the program up as well."""
    if runnable.cold:
        _sample(runnable, _Plan(0, 1), clock)
        return _Plan(0, 1)
    once = min(_sample(runnable, _Plan(warm, 1), clock) for warm in (1, 0, 0))
    if once > LONG_S:
        return _Plan(0, 1)
    calls = max(1, round(SAMPLE_S / once))
    if calls > 1:  # the first guess has the timer's and the caches' cost in it
        calls = max(1, round(SAMPLE_S / _sample(runnable, _Plan(1, calls), clock)))
    return _Plan(1 + calls // 4, calls)


def _sample(runnable: Runnable, plan: _Plan, clock: Clock) -> float:
    step = runnable.program.step
    torch.set_num_threads(runnable.threads)
    if runnable.cold:
        return _from_memory(runnable, clock)
    if runnable.threads > 1:
        time.sleep(SETTLE_S)
    with torch.set_grad_enabled(runnable.program.grad):
        for _ in range(plan.warm):
            step()
        if runnable.device == "cuda":
            return _by_events(step, plan.calls)
        begin = clock()
        for _ in repeat(None, plan.calls):
            step()
        return (clock() - begin) / plan.calls * 1e-9


def _from_memory(runnable: Runnable, clock: Clock) -> float:
    """Seconds a call after another program has filled the caches."""
    seconds = 0.0
    for _ in range(COLD_CALLS):
        _flood().add_(1.0)
        if runnable.threads > 1:
            time.sleep(SETTLE_S)
        with torch.set_grad_enabled(runnable.program.grad):
            begin = clock()
            runnable.program.step()
            seconds += (clock() - begin) * 1e-9
    return seconds / COLD_CALLS


@lru_cache(maxsize=1)
def _flood() -> torch.Tensor:
    return torch.zeros(FLOOD // 4)


def _by_events(step: Callable[[], object], calls: int) -> float:
    """Seconds a call between two events of the current stream: a GPU's, and the host's where the GPU waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in repeat(None, calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls * 1e-3


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
