"""Both sides of a program in turns, each in a process of its own; what they learn is held to each other.

Rounding differs between any two programs that sum in another order, and training makes it grow. How far is no matter of
taste: stock PyTorch on an older instruction set sums in another order too. The budget is twice what stock then differs
from itself, and one rounding.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .results import Deviation, Row, spread

__all__ = ["Fault", "deviation", "in_turns", "measure"]

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OLDER = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}  # how PyTorch, oneDNN and MKL are told to leave newer instructions alone
EPS = torch.finfo(torch.float32).eps


class Fault(RuntimeError):
    """A program that ended, whose two sides differ, or in which fastseq did not run."""


class _Side:
    """A child that runs its side of a program whenever asked."""

    def __init__(
        self, python: Path, name: str, side: str, folder: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        self._log, self._learned = folder / "log.txt", folder / "learned.pt"
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.foreign.child", name, side],
                cwd=ROOT,
                env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)} | (extra or {}),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.about = self._answer()

    def __enter__(self) -> "_Side":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # its input ends, and so does it

    def run(self, path: str = "") -> dict:
        self._process.stdin.write(path + "\n")
        self._process.stdin.flush()
        return self._answer()

    def learn(self) -> list[Tensor]:
        """Losses and tensors of a run."""
        self.run(str(self._learned))
        return torch.load(self._learned)

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise Fault(f"{' '.join(map(str, self._process.args))} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)


def measure(name: str, python: Path, rounds: int) -> Row:
    """`rounds` timed runs of either side, after one of each that is compared; `python` has the package.

    Raises Fault where they differ by more than the budget, a repetition differs at all, or fastseq never ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with _Side(python, name, "count", place) as counted:
            about, counts = counted.about, counted.run()
        if not counts["ran"].get("cpu"):
            raise Fault(f"{name}: fastseq's kernels never ran: {counts['ran']}")
        older = []
        for extra in OLDER.values():
            with _Side(python, name, "stock", place, extra) as side:
                older.append(side.learn())
        with _Side(python, name, "stock", place) as stock, _Side(python, name, "fastseq", place) as ours:
            found = deviation(name, stock.learn(), ours.learn(), older)
            seconds = in_turns(name, stock, ours, rounds)
    ratios = [s / o for s, o in zip(*seconds, strict=True)]
    times = [spread(values) for values in (*seconds, ratios)]
    return Row(name, **about, threads=1, rounds=rounds, calls=counts["calls"], ran=counts["ran"], deviation=found,
               stock=times[0], fastseq=times[1], ratio=times[2])  # fmt: skip


def deviation(name: str, stock: list[Tensor], ours: list[Tensor], older: list[list[Tensor]]) -> Deviation:
    """Of ours from stock's; Fault where it is above the budget. The first tensor has the losses."""
    losses, tensors = _distance(stock, ours)
    elsewhere = [_distance(stock, learned) for learned in older]
    budgets = [2 * max(values) + EPS for values in zip(*elsewhere, strict=True)]
    found = Deviation(losses, tensors, *budgets)
    if not found.within:
        raise Fault(f"{name}: fastseq differs from stock by more than the budget: {found}")
    return found


def _distance(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Of losses, by the largest; of all other tensors together, by their norm. Infinite where shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf"), float("inf")
    losses = (a[0] - b[0]).abs().max() / a[0].abs().max()
    flat_a, flat_b = (torch.cat([t.double().flatten() for t in learned[1:]]) for learned in (a, b))
    return losses.item(), ((flat_a - flat_b).norm() / flat_a.norm()).item()


def in_turns(name: str, stock: _Side, ours: _Side, rounds: int) -> tuple[list[float], list[float]]:
    """CPU seconds of runs, the order turned round each time; Fault where a run does not repeat the one before it."""
    seconds: dict[_Side, list[float]] = {stock: [], ours: []}
    before: dict[_Side, list[float]] = {}
    order = [stock, ours]
    for _ in range(rounds):
        for side in order:
            answer = side.run()
            if answer["losses"] != before.setdefault(side, answer["losses"]):
                raise Fault(f"{name}: the same seed gave other losses: {before[side]}, then {answer['losses']}")
            seconds[side].append(answer["seconds"])
        order.reverse()
    return seconds[stock], seconds[ours]
