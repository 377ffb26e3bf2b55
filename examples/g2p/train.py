"""Training within a time budget: the learning rate follows the clock, so that it is spent when the time is."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .data import Batch, Lexicon, Pairs, batches
from .model import Model
from .score import Scores, score


@dataclass(frozen=True)
class Plan:
    """How to train. The values were chosen on the development set of the papers' split.

    Its word error rate after 12 epochs: 27.1 % with smoothing 0.1; 27.8 without; without, 28.6 with dropout 0.1 and
    28.3 with a decay of 0.1. Batches of 256 at 6e-3 are as good as 128 at 4e-3 (29.6 and 29.8 after 7 and 6 epochs,
    which take as long), and suffer less when other programs want the cores.
    """

    minutes: float = 4.0  # with everything: steps, batches, evaluations
    steps: int | None = None  # in place of minutes: the schedule follows them, and a run can be repeated exactly
    batch: int = 256
    rate: float = 6e-3  # the peak
    warmup: float = 0.04  # share of the run
    decay: float = 0.01  # of the weights
    smoothing: float = 0.1  # of the labels
    clip: float = 1.0  # the gradient's norm
    evaluations: int = 8
    seed: int = 1


class Status(NamedTuple):
    done: float  # 0 to 1
    epoch: float
    loss: float  # nats per phoneme, averaged over about 100 steps
    speed: float  # words/s, evaluations not counted
    left: float  # seconds
    dev: Scores | None  # the latest


def optimizer_of(model: Model, plan: Plan) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), all parameters in one fused call."""
    return AdamW(model.parameters(), plan.rate, weight_decay=plan.decay, fused=True)


def step(model: Model, optimizer: Optimizer, batch: Batch, plan: Plan) -> Tensor:
    """One update; the batch's loss."""
    loss = model.loss(*batch, plan.smoothing)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    return loss.detach()


def evaluate(model: Model, lexicon: Lexicon) -> Scores:
    """Error rates of greedy decoding."""
    words = list(lexicon)
    return score(dict(zip(words, model.pronounce(words), strict=True)), lexicon)


class Training:
    """One run. `save` is called whenever the development set's word error rate has fallen."""

    def __init__(self, model: Model, pairs: Pairs, dev: Lexicon, plan: Plan, save: Callable[[], None]) -> None:
        self.model, self.pairs, self.dev, self.plan, self.save = model, pairs, dev, plan, save
        self.optimizer = optimizer_of(model, plan)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.steps = self.words = 0
        self.loss = math.nan
        self.latest: Scores | None = None
        self.best = math.inf
        self.evaluating = self.longest = 0.0  # seconds: all evaluations, and the longest
        self.start = time.perf_counter()

    def run(self, report: Callable[[Status], None]) -> None:
        """Train to the end of the plan."""
        self.start = time.perf_counter()
        due = 1
        while self.done() < 1:
            for batch in batches(self.pairs, self.plan.batch, self.generator):
                if (done := self.done()) >= 1:
                    break
                if done >= due / self.plan.evaluations:
                    self.evaluate()
                    due = int(done * self.plan.evaluations) + 1
                self.update(batch, done)
                if self.steps % 10 == 0:
                    report(self.status())
        self.evaluate()
        report(self.status())

    def done(self) -> float:
        """Share of the plan that is behind us, the last evaluation left out."""
        if self.plan.steps is not None:
            return self.steps / self.plan.steps
        return self.seconds() / max(1e-9, 60 * self.plan.minutes - 1.1 * self.longest)

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def update(self, batch: Batch, done: float) -> None:
        """One step at the rate of this moment: a linear rise, then half a cosine down to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * min(done / self.plan.warmup, (1 + math.cos(math.pi * done)) / 2)
        loss = step(self.model, self.optimizer, batch, self.plan).item()
        self.loss = loss if math.isnan(self.loss) else self.loss + 0.02 * (loss - self.loss)
        self.steps += 1
        self.words += len(batch.source)

    def evaluate(self) -> None:
        """Score the development set, and keep the model if it is the best so far."""
        start = time.perf_counter()
        self.latest = evaluate(self.model, self.dev)
        if self.latest.wer <= self.best:
            self.save()
            self.best = self.latest.wer
        taken = time.perf_counter() - start
        self.evaluating += taken
        self.longest = max(self.longest, taken)

    def status(self) -> Status:
        done, seconds = self.done(), self.seconds()
        left = 60 * self.plan.minutes - seconds if self.plan.steps is None else seconds * (1 / max(done, 1e-9) - 1)
        speed = self.words / max(1e-9, seconds - self.evaluating)
        return Status(
            min(1.0, done), self.words / len(self.pairs.source), self.loss, speed, max(0.0, left), self.latest
        )
