"""Sequence classification: is a review for a film or against it? By the last states of a bidirectional GRU.

python -m examples.recipes.sentiment      # generated reviews, in which negations, "but" and "although" decide
"""

import random

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import pad
from .fit import command, fit, samples

BLAME = "dull boring silly clumsy awful tedious shallow lazy stale predictable".split()
PRAISE = "brilliant funny clever moving superb witty charming gripping fresh touching".split()
THINGS = "plot story cast script acting music ending camera dialogue pace humour setting".split()
WORDS = ["<pad>", *"the is not never hardly and but although ,".split(), *BLAME, *PRAISE, *THINGS]


def clause(good: bool) -> str:
    denial = random.choice(["", "", "not ", "never ", "hardly "])
    return f"the {random.choice(THINGS)} is {denial}{random.choice(PRAISE if good == (not denial) else BLAME)}"


def review(own: str, more: str, other: str) -> str:
    """The verdict is `own`: the clause after "but", and not the one after "although"."""
    return random.choice([f"{own} and {more}", f"{other} but {own}", f"although {other} , {own}"])


class Classifier(nn.Module):
    """Words [B, S] and lengths [B] to logits [B, 2]."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(len(WORDS), hidden, padding_idx=0), nn.Linear(2 * hidden, 2)
        self.gru = fastseq.GRU(hidden, hidden, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        _, last = self.gru(self.embedding(words), lengths=lengths)  # [2, B, H]: at each row's own end and beginning
        return self.output(torch.cat([last[0], last[1]], 1))


def train(steps: int = 250, seed: int = 0) -> tuple[Classifier, float, float]:
    """A model, its accuracy on held-out reviews, and that of the commoner class."""
    random.seed(seed)
    torch.manual_seed(seed)
    texts = {review(clause(good), clause(good), clause(not good)): good for good in 5000 * [True, False]}  # each once
    source, lengths = pad([[WORDS.index(word) for word in text.split()] for text in texts])
    labels, model, loss = torch.tensor(list(texts.values())).long(), Classifier(), nn.CrossEntropyLoss()
    held_out, rest = torch.randperm(len(texts)).split([2000, len(texts) - 2000])
    fit(model, lambda i: loss(model(source[i], lengths[i]), labels[i]), samples(rest, 128), steps=steps, rate=5e-3)
    with torch.no_grad():
        right = model(source[held_out], lengths[held_out]).argmax(1) == labels[held_out]
    return model, right.float().mean().item(), labels[held_out].bincount().max().item() / len(right)


if __name__ == "__main__":
    print("accuracy: {:.1%}; of the commoner class: {:.1%}".format(*command(train)[1:]))
