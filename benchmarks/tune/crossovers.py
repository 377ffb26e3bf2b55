"""Where another backend is faster than the one `auto` takes by itself: a grid of layers and cells, and from it rules.

On a GPU `auto` takes PyTorch's own operators and ours are the others; on a CPU it takes our kernels, and PyTorch's
operators are the other.

A size that was not measured counts as the next larger one that was, if the next smaller one agrees: a rule names calls
between measured sizes that are all faster, and nothing beyond the largest.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

from fastseq.crossover import MOST, Rule

from ..cases import Case, LayerCase
from .configs import Seconds

__all__ = ["BATCHES", "HIDDEN", "Kind", "Machine", "case_of", "kinds_of", "measure", "rules_of"]

HIDDEN, BATCHES = (64, 128, 256, 512), (1, 8, 64)
GAIN = 1.03  # as many times as fast, at least: less may be another day's loss


class Machine(NamedTuple):
    """Where rules hold, and who is measured."""

    device: str  # "cpu" | "cuda"
    name: str  # of `crossover.Rule.machine`
    where: str  # for the rule's reason
    threads: tuple[int, ...] = (0,)  # each measured by itself; 0: whatever they are

    @property
    def usual(self) -> str:
        """What `auto` takes without a rule."""
        return "torch" if self.device == "cuda" else "cpu"

    @property
    def others(self) -> tuple[str, ...]:
        return ("triton", "cuda") if self.device == "cuda" else ("torch",)

    @property
    def steps(self) -> dict[int, tuple[int, int]]:
        """Measured, and the bounds that each stands for."""
        return {1: (1, 2), 128 if self.device == "cuda" else 50: (2, MOST)}


class Kind(NamedTuple):
    """What a rule cannot lump together."""

    steps: int
    dtype: str
    grad: bool
    cell: str


def kinds_of(machine: Machine) -> tuple[Kind, ...]:
    """Everything that is measured there."""
    return tuple(Kind(*k) for k in product(machine.steps, ("bfloat16", "float32"), (True, False), ("lstm", "gru")))


def case_of(kind: Kind, hidden: int, batch: int, device: str = "cuda") -> Case:
    """One step is a cell's; layers of one step go the same way."""
    op = f"{kind.cell}_cell" if kind.steps == 1 else kind.cell
    mode = "train" if kind.grad else "forward"
    return LayerCase(op, mode, kind.steps, batch, hidden, hidden, dtype=kind.dtype, hx=kind.steps == 1, device=device)


def measure(
    timer: Seconds, machine: Machine, seconds: float, kinds: Sequence[Kind] = (), others: Sequence[str] = ()
) -> list[Rule]:
    """Rules for the machine, of as many kinds as the time allows. Of several others a rule names the fastest."""
    stop, rules, before = time.monotonic() + seconds, list[Rule](), torch.get_num_threads()
    others = others or machine.others
    try:
        for kind, threads in product(kinds or kinds_of(machine), machine.threads):
            if time.monotonic() > stop:
                print(f"out of time: {kind} and what follows is not measured")
                break
            torch.set_num_threads(threads or before)
            sizes = product(HIDDEN, BATCHES)
            found = {
                (h, b): _ratios(timer, case_of(kind, h, b, machine.device), machine.usual, others) for h, b in sizes
            }
            for name in others:
                best = {at: of[name] if of[name] == max(of.values()) else 0.0 for at, of in found.items()}
                rules += rules_of(kind, best, machine, name, threads)
    finally:
        torch.set_num_threads(before)
    return rules


def _ratios(timer: Seconds, case: Case, usual: str, others: Sequence[str]) -> dict[str, float]:
    """The usual one's time over that of each; 0 for a kernel that refuses or fails, which is not faster."""
    try:
        took = timer(case, (*others, usual))
    except Exception as error:
        if len(others) > 1:  # some may do
            return {name: _ratios(timer, case, usual, (name,))[name] for name in others}
        print(f"{case}: {others[0]}: {type(error).__name__}: {error}")
        return {others[0]: 0.0}
    ratios = {name: took[usual] / took[name] for name in others}
    print(f"{case}: {usual} over " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    return ratios


def rules_of(
    kind: Kind, ratios: dict[tuple[int, int], float], machine: Machine, backend: str, threads: int = 0
) -> Iterator[Rule]:
    """One rule for each run of neighbouring batches, equal runs of neighbouring sizes together."""
    held = {"threads": (threads, threads + 1)} if threads else {}
    bounds_h, bounds_b = _bounds(HIDDEN), _bounds(BATCHES)
    by_size = [_runs([_faster(ratios, i, j) for j in range(len(BATCHES))]) for i in range(len(HIDDEN))]
    done: set[tuple[int, tuple[int, int]]] = set()
    for i, runs in enumerate(by_size):
        for run in runs:
            if (i, run) in done:
                continue
            last = i
            while last + 1 < len(HIDDEN) and run in by_size[last + 1]:
                last += 1
            done |= {(k, run) for k in range(i, last + 1)}
            seen = [ratios[HIDDEN[k], BATCHES[j]] for k in range(i, last + 1) for j in range(run[0], run[1])]
            gain = f"{min(seen):.2f} to {max(seen):.2f} times as fast as {machine.usual}"
            how = f"{gain} at {len(seen)} sizes, T={kind.steps}"
            yield Rule(
                backend, f"{how}; {machine.where}", device=machine.device, machine=machine.name, cells=(kind.cell,),
                dtypes=(kind.dtype,), grad=kind.grad, lengths=False, hidden=(bounds_h[i], bounds_h[last + 1]),
                batch=(bounds_b[run[0]], bounds_b[run[1]]), steps=machine.steps[kind.steps], **held,
            )  # fmt: skip


def _faster(ratios: dict[tuple[int, int], float], i: int, j: int) -> bool:
    """At a measured size and at the next smaller ones, of whose calls the rule would speak as well."""
    near = product({max(i - 1, 0), i}, {max(j - 1, 0), j})
    return all(ratios[HIDDEN[k], BATCHES[n]] >= GAIN for k, n in near)


def _bounds(sizes: Sequence[int]) -> list[int]:
    """Of the half-open intervals that end with each size."""
    return [1, *(size + 1 for size in sizes)]


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """[begin, end) of each run of True."""
    edges = [k for k in range(len(flags) + 1) if (k < len(flags) and flags[k]) != (k > 0 and flags[k - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
