"""Seconds of a case by a backend, after its results were found right: what the searches ask."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..calm import MEMORY, Watch
from ..cases import Case
from ..equality import check, precision, truth_of
from ..kinds import draw, fastseq_program
from ..problem import Problem
from ..programs import Results
from ..stats import median
from ..timing import Effort, Runnable, interleave

__all__ = ["Timer"]

TRIES = 3  # of a calm measurement
EFFORT = Effort(seconds=0.15, least=5, most=25, patience=1.0)


def _drawn(case: Case) -> tuple[Problem, Results]:
    problem = draw(case)
    return problem, truth_of(problem)


class Timer:
    """Keeps the problems and truths of the two cases it was asked for last."""

    def __init__(self) -> None:
        self._known = lru_cache(maxsize=2)(_drawn)
        self._watch = Watch(MEMORY)

    def __call__(self, case: Case, backends: Sequence[str]) -> dict[str, float]:
        """By backend; a wrong result, whatever keeps a kernel from running, and a machine that is never calm raises."""
        problem, truth = self._known(case)
        runnables = {}
        for name in backends:
            program = fastseq_program(name)(problem)
            if name != "torch":  # of which nothing is claimed
                check(program, truth, precision(case))
            runnables[name] = Runnable(program, torch.get_num_threads(), case.device)
        calm = self._watch.calm if case.device == "cpu" else lambda threads: True
        for _ in range(TRIES):
            taken = interleave(runnables, EFFORT, calm)
            if not taken.mixed:
                break
        else:
            raise RuntimeError("others disturbed every try")
        return {name: median(values) for name, values in taken.values.items()}
