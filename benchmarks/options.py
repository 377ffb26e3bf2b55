"""`python -m benchmarks.options`: what the options of a layer's recurrence cost, over the same layer without them.

Both run the fused kernels, in turns; what an option computes is first checked against the reference, mask for mask.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastseq

from .calm import MEMORY, Watch
from .machine import describe
from .programs import Program
from .stats import bootstrap, geometric_mean, median, quantile
from .timing import Effort, Runnable, interleave

__all__ = ["OPTIONS", "Cost", "main", "rows"]

OPTIONS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.1},
    "dropout of the state": {"recurrent_dropout": 0.2},
    "dropout of the update": {"recurrent_dropout": 0.2, "recurrent_dropout_on": "update"},
    "learned state": {"learn_state": True},
    "every cell state": {},
    "resets": {},
    "layer normalisation": {"layer_norm": True},
}
SHAPES = ((8, 128), (32, 256), (64, 512))  # B, H = I
T, LIMIT, TOLERANCE = 50, 1.15, 1e-4
LIMITS = {"layer normalisation": 1.5}  # of those whose limit is another


@dataclass(frozen=True)
class Cost:
    """Seconds of a layer with an option over those without."""

    kind: str
    option: str
    mode: str  # "forward" in training mode without gradients, "train" with all of them
    B: int
    H: int
    threads: int
    ratio: float  # median over the rounds
    q20: float
    q80: float
    low: float  # its 95 % interval
    high: float
    calm: float  # the share of rounds that nobody disturbed

    def __str__(self) -> str:
        shape, spread = f"B={self.B} H={self.H} {self.threads}t", f"[{self.q20:.2f}, {self.q80:.2f}]"
        return f"{self.kind:<5} {self.option:<22} {self.mode:<8} {shape:<16} {self.ratio:5.2f}  {spread}"


def rows() -> Iterator[tuple[str, str, str, int, int]]:
    """Every (kind, option, mode, B, H) that there is."""
    for (B, H), kind, option, mode in product(SHAPES, ("LSTM", "GRU", "RNN"), OPTIONS, ("forward", "train")):
        lacks = {
            "GRU": ("every cell state",),
            "RNN": ("every cell state", "dropout of the update", "layer normalisation"),
        }.get(kind, ())
        if option not in lacks:
            yield kind, option, mode, B, H


def _step(kind: str, option: str, B: int, H: int, backend: str, train: bool) -> Callable[[], list[Tensor]]:
    """One call, and in training the gradients of everything; seeded weights and input."""
    torch.manual_seed(1)
    module = getattr(fastseq, kind)(H, H, backend=backend, **OPTIONS.get(option, {}))
    x = torch.randn(T, B, H, requires_grad=train)
    given = {"resets": torch.rand(T, B) < 0.05} if option == "resets" else {}
    call = module.forward_states if option == "every cell state" else module
    inputs, seed = [x, *module.parameters()], torch.randn(T, B, H)

    def step() -> list[Tensor]:
        out, _, *cells = call(x, **given)
        return [out, *cells, *(torch.autograd.grad([out, *cells], inputs, [seed] * (1 + len(cells))) if train else ())]

    return step


def _check(kind: str, option: str, train: bool) -> None:
    """Raise AssertionError unless kernels and reference agree on a small layer."""
    found = []
    for backend in ("cpu", "reference"):
        step = _step(kind, option, 3, 20, backend, train)
        torch.manual_seed(2)
        found.append(step())
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * expected.abs().max().clamp(min=1).item())


def _measure(row: tuple[str, str, str, int, int], threads: int, effort: Effort, watch: Watch) -> Cost:
    kind, option, mode, B, H = row
    train = mode == "train"
    _check(kind, option, train)
    ours = {name: _step(kind, o, B, H, "cpu", train) for name, o in (("option", option), ("plain", ""))}
    programs = {name: Runnable(Program(step, dict, train, "cpu"), threads) for name, step in ours.items()}
    samples = interleave(programs, effort, watch.calm)
    ratios = [a / b for a, b in zip(samples.values["option"], samples.values["plain"], strict=True)]
    quantiles = (median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8))
    return Cost(kind, option, mode, B, H, threads, *quantiles, *bootstrap(ratios), samples.calm)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--threads", default="1", help="a list, such as 1,2")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each row")
    parser.add_argument("--only", default="", help="rows whose kind, option or mode is this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    watch, costs = Watch(MEMORY), []
    for threads, row in product(map(int, given.threads.split(",")), rows()):
        if given.only and given.only not in row:
            continue
        costs.append(_measure(row, threads, Effort(seconds=given.seconds), watch))
        print(costs[-1], flush=True)
    print("\noption                  rows  geometric mean  most  above its limit")
    for option in OPTIONS:
        ratios = [cost.ratio for cost in costs if cost.option == option]
        if not ratios:
            continue
        limit = LIMITS.get(option, LIMIT)
        above = f"{sum(ratio > limit for ratio in ratios)} of {limit}"
        print(f"{option:<22} {len(ratios):>5} {geometric_mean(ratios):>15.2f} {max(ratios):>5.2f} {above:>16}")
    watch.save()
    if given.json:
        command = "python -m benchmarks.options " + " ".join(sys.argv[1:] if arguments is None else arguments)
        report = {"environment": {**describe(), "command": command}, "rows": [asdict(cost) for cost in costs]}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
