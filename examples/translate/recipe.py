"""The recipe: what examples.training trains, and the plans of the four papers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

from ..training import recipe
from ..training.batches import PAD, Batch
from . import data
from .data import Splits
from .model import DropoutEmbedding, Model, build, translate
from .score import Scores, bleu
from .stock import StockModel


@dataclass(frozen=True)
class Plan(recipe.Plan):
    """What to train, and how.

    For an hour on two cores. One thread of a Zen 4 trained 2,600 (sutskever) to 4,600 (luong) words/s of an epoch's
    409,214, so an hour is tens of epochs of 29,000 pairs, and dropout is as high as usual for this data: chosen, not
    searched. bahdanau at 0.4 came to 31.8 BLEU on val in 8 minutes of one thread, 4.3 epochs.
    """

    minutes: float = 60.0
    batch: int = 128
    rate: float = 2e-3
    evaluations: int = 30
    paper: str = "bahdanau"
    embedding: int = 256
    hidden: int = 512
    layers: int = 1
    dropout: float = 0.5
    least: int = 2  # occurrences of a word in the vocabulary


PLANS = {
    "sutskever": Plan(paper="sutskever", layers=2),
    "cho": Plan(paper="cho"),
    "bahdanau": Plan(),
    "luong": Plan(paper="luong"),
}


def frequencies(target: Tensor, size: int) -> Tensor:  # [N, T + 1] -> [size]
    """Log-frequencies of the words to predict, each counted once more: the output's first bias.

    Otherwise the first steps push all features one way to learn them, and a tanh readout stays saturated: luong of 192
    units had a BLEU of 0 after 1.5 epochs at 3e-3, with this bias 17.7.
    """
    counts = torch.bincount(target[:, 1:].flatten(), minlength=size).float()
    counts[PAD] = 0
    return ((counts + 1) / (counts + 1).sum()).log()


class Recipe(recipe.Recipe):
    """Translations of Multi30k."""

    name = "translate"
    score_type = Scores

    def __init__(self, splits: Splits, plan: Plan) -> None:
        super().__init__(plan)
        self.splits, self.digest = splits, data.digest(splits)
        self.words_of = [data.vocabulary(side, plan.least) for side in splits.train]
        backwards = plan.paper == "sutskever"
        self.pairs, self.dev = (data.encode(part, *self.words_of, backwards) for part in (splits.train, splits.dev))

    def build(self) -> fastseq.Seq2Seq:
        plan: Any = self.plan
        model = build(
            plan.paper, *self.words_of, embedding=plan.embedding, hidden=plan.hidden, layers=plan.layers,
            dropout=plan.dropout, limit=self.pairs.target.shape[1],
        )  # fmt: skip
        model.output.bias.data.copy_(frequencies(self.pairs.target, model.vocab_size))
        return model

    def stock(self, model: fastseq.Seq2Seq) -> nn.Module:
        return StockModel(model)

    def learner(self, model: fastseq.Seq2Seq, library: str) -> Model:
        made: Any = super().learner(model, library)
        plan: Any = self.plan
        made.encoder.embedding = DropoutEmbedding(made.encoder.embedding, plan.dropout)
        return made

    def evaluate(self, model: Model) -> Scores:
        return Scores(bleu(translate(model, self.splits.dev.source), self.splits.dev.target), self.dev_loss(model))

    def words(self, batch: Batch) -> int:
        """Of the target, the end counted."""
        return batch.tokens

    @property
    def epoch(self) -> int:
        return int(self.pairs.target_length.sum()) - len(self.pairs.target)
