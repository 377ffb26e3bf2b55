"""The same model from fastseq and from torch.nn, trained side by side for a few seconds."""

import time
from statistics import median
from typing import NamedTuple

import torch

import fastseq

from .recipe import LIBRARIES, Recipe

TOLERANCE = {"fp32": 1e-4, "bf16": 4e-3}  # of a loss; bf16 rounds by as much
ROUNDS, STEPS = 40, 4  # a round: STEPS updates of the one, then the same batches with the other


class Speed(NamedTuple):
    fastseq: float  # words/s, the median round's
    torch: float
    ratio: float  # the median of the rounds' ratios

    def __str__(self) -> str:
        return f"{self.fastseq:,.0f} words/s with fastseq, {self.torch:,.0f} with torch.nn: {self.ratio:.2f} x"


def compare(model: fastseq.Seq2Seq, recipe: Recipe) -> Speed:
    """Time whole training steps from the same parameters on the same batches; they must also agree."""
    twins = [recipe.learner(model, library) for library in LIBRARIES]
    optimizers = [recipe.optimizer(twin) for twin in twins]
    supply = recipe.batches(torch.Generator().manual_seed(recipe.plan.seed))
    losses = []
    for pair in zip(twins, optimizers, strict=True):
        torch.manual_seed(recipe.plan.seed)  # of dropout
        losses.append(recipe.step(*pair, supply[0]))  # and warms up
    ours, theirs = losses
    if not abs(ours - theirs) <= TOLERANCE[recipe.plan.precision] * abs(theirs):
        raise AssertionError(f"the two libraries disagree: loss {ours:.6f} from fastseq, {theirs:.6f} from torch.nn")
    rates: tuple[list[float], list[float]] = [], []
    for n in range(ROUNDS):
        chunk = [supply[(n * STEPS + i) % len(supply)] for i in range(STEPS)]
        for which in (0, 1) if n % 2 else (1, 0):
            start = time.perf_counter()
            for batch in chunk:
                recipe.step(twins[which], optimizers[which], batch)
            rates[which].append(sum(map(recipe.words, chunk)) / (time.perf_counter() - start))
    return Speed(*map(median, rates), median(a / b for a, b in zip(*rates, strict=True)))
