"""Training within a time budget: the learning rate follows the clock, so that it is spent when the time is.

A run is what `Training.state` gives: from it another process goes on with the same losses, bit by bit, on as many
threads, and with the seconds that were used.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastseq

from .batches import Batch
from .recipe import Recipe, Scores
from .resume import Numbers, Tensors

KEPT = ("steps", "words", "position", "due", "loss", "lowest", "history", "evaluating", "longest")  # numbers of a run


class Status(NamedTuple):
    done: float  # 0 to 1
    epoch: float
    loss: float  # nats per token, averaged over about 100 steps
    speed: float  # words/s, evaluations not counted
    left: float  # seconds
    dev: Scores | None  # the latest


class Training:
    """One run: `model` learns, `best` is as it was when the development set's cost was lowest.

    `history` has a row for each evaluation: seconds since the start, those of evaluations among them, steps, epoch,
    loss and the scores. `save` is called when `state` is worth keeping: after the first step, then every `pause`
    seconds, and after an evaluation; True where that one made a new `best`.
    """

    def __init__(
        self,
        recipe: Recipe,
        best: fastseq.Seq2Seq,
        save: Callable[["Training", bool], None],
        pause: float = 10.0,
    ) -> None:
        self.recipe, self.plan, self.best = recipe, recipe.plan, best
        self.model = recipe.learner(best, recipe.plan.library)
        self.save, self.pause, self.saved = save, pause, -math.inf
        self.optimizer = recipe.optimizer(self.model)
        self.generator = torch.Generator().manual_seed(self.plan.seed)
        self.order = self.generator.get_state()  # as this epoch found it
        self.position = 0  # batches of this epoch that are done
        self.steps = self.words = 0
        self.due = 1  # the next evaluation
        self.loss = math.nan
        self.history: list[dict[str, Any]] = []
        self.lowest = math.inf
        self.evaluating = self.longest = 0.0  # seconds: all evaluations, and the longest
        self.used = 0.0  # seconds, by the processes before this one
        self.start = time.perf_counter()
        torch.manual_seed(self.plan.seed)  # of dropout: whatever a library drew to build its model

    def run(self, report: Callable[[Status], None]) -> None:
        """Train to the end of the plan."""
        self.start = time.perf_counter()
        while self.done() < 1:
            self.order = self.generator.get_state()
            for batch in self.recipe.batches(self.generator)[self.position :]:
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
        loss = self.recipe.step(self.model, self.optimizer, batch).item()
        self.loss = loss if math.isnan(self.loss) else self.loss + 0.02 * (loss - self.loss)
        self.steps += 1
        self.position += 1
        self.words += self.recipe.words(batch)

    def evaluate(self) -> None:
        """Score the development set, and keep the model if it is the best so far."""
        start = time.perf_counter()
        self.model.eval()
        scores = self.recipe.evaluate(self.model)
        self.model.train()
        if better := scores.cost <= self.lowest:
            self.best.load_state_dict(self.model.state_dict())
            self.lowest = scores.cost
        taken = time.perf_counter() - start
        self.evaluating += taken
        self.longest = max(self.longest, taken)
        moment = {"seconds": self.seconds(), "evaluating": self.evaluating, "steps": self.steps, "epoch": self.epoch()}
        self.history.append(moment | {"loss": self.loss, "scores": scores._asdict()})
        self.keep(better)

    def keep(self, better: bool = False) -> None:
        self.save(self, better)
        self.saved = time.perf_counter()

    def state(self) -> tuple[Tensors, Numbers]:
        """Between two steps: all that `restore` needs."""
        tensors = {"order": self.order, "random": torch.get_rng_state()}
        for name, module in (("model", self.model), ("best", self.best)):
            shared = {t.data_ptr(): key for key, t in reversed(module.state_dict().items())}  # tied ones once
            tensors |= {f"{name}.{key}": t for key, t in module.state_dict().items() if shared[t.data_ptr()] == key}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": t for key, t in moments.items()}
        return tensors, {"used": self.seconds()} | {name: getattr(self, name) for name in KEPT}

    def restore(self, tensors: Tensors, numbers: Numbers) -> None:
        """Go on from there, with the same losses."""
        for name, module in (("model", self.model), ("best", self.best)):
            module.load_state_dict(module.state_dict() | under(name, tensors))  # a tied one reads itself
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
        self.used, self.start = numbers["used"], time.perf_counter()

    def epoch(self) -> float:
        return self.words / self.recipe.epoch

    def status(self) -> Status:
        done, seconds = self.done(), self.seconds()
        left = 60 * self.plan.minutes - seconds if self.plan.steps is None else seconds * (1 / max(done, 1e-9) - 1)
        speed = self.words / max(1e-9, seconds - self.evaluating)
        dev = self.recipe.score_type(**self.history[-1]["scores"]) if self.history else None
        return Status(min(1.0, done), self.epoch(), self.loss, speed, max(0.0, left), dev)


def under(name: str, tensors: Tensors) -> Tensors:
    """Those of one part, by their names within it."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
