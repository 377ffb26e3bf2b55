"""Training within a time budget: the learning rate follows the clock, so that it is spent when the time is.

A run is what `Training.state` gives: from it another process goes on with the same losses, bit by bit, on as many
threads, and with the seconds that were used.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import fastseq

from .data import Batch, Lexicon, Pairs, batches
from .model import Model, pronounce
from .resume import Numbers, Tensors
from .score import Scores, score

KEPT = ("steps", "words", "position", "due", "loss", "lowest", "latest", "evaluating", "longest")  # numbers of a run


@dataclass(frozen=True)
class Plan:
    """What to train, and how: all that one run has different from another.

    The values were chosen on the development set of the papers' split. Its word error rate after 12 epochs: 27.1 %
    with smoothing 0.1; 27.8 without; without, 28.6 with dropout 0.1 and 28.3 with a decay of 0.1. Batches of 256 at
    6e-3 are as good as 128 at 4e-3 (29.6 and 29.8 after 7 and 6 epochs, which take as long), and suffer less when
    other programs want the cores.
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
    hidden: int = 64  # units
    layers: int = 2  # of either side
    library: str = "fastseq"


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
    loss = model.loss(*batch, label_smoothing=plan.smoothing)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    return loss.detach()


def evaluate(model: Model, lexicon: Lexicon, beams: int = 1) -> Scores:
    """Error rates of greedy decoding, or of beam search."""
    words = list(lexicon)
    return score(dict(zip(words, pronounce(model, words, beams), strict=True)), lexicon)


class Training:
    """One run: `model` learns, `best` is as it was when the development set's word error rate was lowest.

    `save` is called when `state` is worth keeping: after the first step, then every `pause` seconds, and after an
    evaluation; True where that one made a new `best`.
    """

    def __init__(
        self,
        model: Model,
        best: fastseq.Seq2Seq,
        pairs: Pairs,
        dev: Lexicon,
        plan: Plan,
        save: Callable[["Training", bool], None],
        pause: float = 10.0,
    ) -> None:
        self.model, self.best, self.pairs, self.dev, self.plan = model, best, pairs, dev, plan
        self.save, self.pause, self.saved = save, pause, -math.inf
        self.optimizer = optimizer_of(model, plan)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.order = self.generator.get_state()  # as this epoch found it
        self.position = 0  # batches of this epoch that are done
        self.steps = self.words = 0
        self.due = 1  # the next evaluation
        self.loss = math.nan
        self.latest: Scores | None = None
        self.lowest = math.inf
        self.evaluating = self.longest = 0.0  # seconds: all evaluations, and the longest
        self.used = 0.0  # seconds, by the processes before this one
        self.start = time.perf_counter()

    def run(self, report: Callable[[Status], None]) -> None:
        """Train to the end of the plan."""
        self.start = time.perf_counter()
        while self.done() < 1:
            self.order = self.generator.get_state()
            for batch in batches(self.pairs, self.plan.batch, self.generator)[self.position :]:
                if (done := self.done()) >= 1:
                    break
                if done >= self.due / self.plan.evaluations:
                    self.due = int(done * self.plan.evaluations) + 1
                    self.evaluate()
                self.update(batch, done)
                if time.perf_counter() - self.saved >= self.pause:
                    self.keep()
                if self.steps % 10 == 0:
                    report(self.status())
            else:
                self.position = 0
        self.evaluate()
        report(self.status())

    def done(self) -> float:
        """Share of the plan that is behind us, the last evaluation left out."""
        if self.plan.steps is not None:
            return self.steps / self.plan.steps
        return self.seconds() / max(1e-9, 60 * self.plan.minutes - 1.1 * self.longest)

    def seconds(self) -> float:
        return self.used + time.perf_counter() - self.start

    def update(self, batch: Batch, done: float) -> None:
        """One step at the rate of this moment: a linear rise, then half a cosine down to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * min(done / self.plan.warmup, (1 + math.cos(math.pi * done)) / 2)
        loss = step(self.model, self.optimizer, batch, self.plan).item()
        self.loss = loss if math.isnan(self.loss) else self.loss + 0.02 * (loss - self.loss)
        self.steps += 1
        self.position += 1
        self.words += len(batch.source)

    def evaluate(self) -> None:
        """Score the development set, and keep the model if it is the best so far."""
        start = time.perf_counter()
        self.model.eval()
        self.latest = evaluate(self.model, self.dev)
        self.model.train()
        if better := self.latest.wer <= self.lowest:
            self.best.load_state_dict(self.model.state_dict())
            self.lowest = self.latest.wer
        taken = time.perf_counter() - start
        self.evaluating += taken
        self.longest = max(self.longest, taken)
        self.keep(better)

    def keep(self, better: bool = False) -> None:
        self.save(self, better)
        self.saved = time.perf_counter()

    def state(self) -> tuple[Tensors, Numbers]:
        """Between two steps: all that `restore` needs."""
        tensors = {"order": self.order, "random": torch.get_rng_state()}
        for name, module in (("model", self.model), ("best", self.best)):
            tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in moments.items()}
        return tensors, {"used": self.seconds()} | {name: getattr(self, name) for name in KEPT}

    def restore(self, tensors: Tensors, numbers: Numbers) -> None:
        """Go on from there, with the same losses."""
        self.model.load_state_dict(under("model", tensors))
        self.best.load_state_dict(under("best", tensors))
        moments: dict[int, dict[str, Any]] = {}
        for name, t in under("optimizer", tensors).items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = t
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.order = tensors["order"]
        self.generator.set_state(self.order)
        torch.set_rng_state(tensors["random"])
        for name in KEPT:
            setattr(self, name, numbers[name])
        self.latest = None if self.latest is None else Scores(*self.latest)
        self.used, self.start = numbers["used"], time.perf_counter()

    def status(self) -> Status:
        done, seconds = self.done(), self.seconds()
        left = 60 * self.plan.minutes - seconds if self.plan.steps is None else seconds * (1 / max(done, 1e-9) - 1)
        speed = self.words / max(1e-9, seconds - self.evaluating)
        return Status(
            min(1.0, done), self.words / len(self.pairs.source), self.loss, speed, max(0.0, left), self.latest
        )


def under(name: str, tensors: Tensors) -> Tensors:
    """Those of one part, by their names within it."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
