"""What a run trains: a Recipe, which has the data, the models of both libraries, a step and a score; and its Plan."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import fastseq

from .batches import Batch, Pairs, batches, in_order

LIBRARIES = ("fastseq", "torch")
PRECISIONS = ("fp32", "bf16")
Model = Any  # fastseq.Seq2Seq, or a module from torch.nn with its loss, generate, extra and parameters


@dataclass(frozen=True)
class Plan:
    """How to train: all that one run has different from another."""

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
    library: str = "fastseq"
    precision: str = "fp32"  # "bf16": of products in training, by autocast; all that is kept is fp32


class Scores(Protocol):
    """Of the development set; a NamedTuple of numbers."""

    @property
    def cost(self) -> float:
        """What the best model has least of."""

    @property
    def brief(self) -> str:
        """For a line of progress."""

    def _asdict(self) -> dict[str, Any]: ...


class Recipe(ABC):
    """A model, its data and its plan.

    pairs: to train on. dev: the development set. digest: of all data. `fastseq` and `torch` have the same parameters by
    the same names, draw the same dropout from the same seed, and so have the same losses up to rounding.
    """

    name: ClassVar[str]
    score_type: ClassVar[type]  # of `evaluate`
    pairs: Pairs
    dev: Pairs
    digest: str

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @abstractmethod
    def build(self) -> fastseq.Seq2Seq:
        """A new model, drawn from torch's generator: what is saved."""

    @abstractmethod
    def stock(self, model: fastseq.Seq2Seq) -> nn.Module:
        """The same model from torch.nn, with its parameters."""

    @abstractmethod
    def evaluate(self, model: Model) -> Scores:
        """The development set's, of a model in eval mode."""

    @abstractmethod
    def words(self, batch: Batch) -> int:
        """What speeds count."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """`words` of all pairs."""

    def learner(self, model: fastseq.Seq2Seq, library: str) -> Model:
        """A copy by "fastseq" or "torch" that is to be trained."""
        return (copy.deepcopy(model) if library == "fastseq" else self.stock(model)).train()

    def models(self, seed: int) -> tuple[Model, Model]:
        """New models of fastseq and of torch.nn, with equal parameters."""
        torch.manual_seed(seed)
        model = self.build()
        return self.learner(model, "fastseq"), self.learner(model, "torch")

    def batches(self, generator: torch.Generator) -> list[Batch]:
        """An epoch."""
        return batches(self.pairs, self.plan.batch, generator)

    def optimizer(self, model: Model) -> Optimizer:
        """AdamW (Loshchilov and Hutter 2019), all parameters in one fused call."""
        return AdamW(model.parameters(), self.plan.rate, weight_decay=self.plan.decay, fused=True)

    def step(self, model: Model, optimizer: Optimizer, batch: Batch) -> Tensor:
        """One update; the batch's loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.plan.precision == "bf16"):
            loss = model.loss(*batch, label_smoothing=self.plan.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.plan.clip)
        optimizer.step()
        return loss.detach()

    def dev_loss(self, model: Model) -> float:
        """Nats per token of the development set, of a model in eval mode."""
        supply = in_order(self.dev, self.plan.batch)
        with torch.no_grad():
            total = sum(float(model.loss(*batch)) * batch.tokens for batch in supply)
        return total / sum(batch.tokens for batch in supply)
