"""An attention encoder and decoder in which every recurrent layer runs over the whole sequence in one call.

The encoder is bidirectional. The decoder attends between its layers (as GNMT does, Wu et al. 2016): the first layer
asks (Luong et al. 2015, the general score), the layers above read its state and the context it found. No context flows
back to the layer that asks, so in training neither attention nor recurrence needs a Python loop over steps.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

from .data import BOS, EOS, PAD, SPECIAL, spell

State = tuple[Tensor, Tensor]  # (h, c), each [layers, B, H]


class Memory(NamedTuple):
    """What the decoder reads of the source."""

    out: Tensor  # [B, S, 2H]
    keys: Tensor  # [B, H, S], projected once and not at every step
    mask: Tensor | None  # [B, 1, S], True = attend; None = all


@dataclass(frozen=True)
class Config:
    """All that builds a model: stored in the checkpoint."""

    letters: list[str]
    phonemes: list[str]
    hidden: int = 64  # units of a layer and direction, and of the embeddings
    layers: int = 2
    limit: int = 40  # phonemes of a pronunciation, at most


class Model(nn.Module):
    """Letters to phonemes. `library` gives LSTM: fastseq or torch.nn, with equal parameters and results."""

    def __init__(self, config: Config, library: ModuleType = fastseq) -> None:
        super().__init__()
        if config.layers < 2:
            raise ValueError(f"layers={config.layers}: the decoder attends between layers, it needs two or more")
        self.config, size, above = config, config.hidden, config.layers - 1
        self.letters = nn.Embedding(len(config.letters) + SPECIAL, size, padding_idx=PAD)
        self.phonemes = nn.Embedding(len(config.phonemes) + SPECIAL, size, padding_idx=PAD)
        self.encoder = library.LSTM(size, size, config.layers, batch_first=True, bidirectional=True)
        self.asking = library.LSTM(size, size, batch_first=True)
        self.reading = library.LSTM(3 * size, size, above, batch_first=True)
        self.keys = nn.Linear(2 * size, size, bias=False)
        self.readout = nn.Linear(3 * size, size)
        self.output = nn.Linear(size, len(config.phonemes) + SPECIAL)

    def loss(self, source: Tensor, length: Tensor | None, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy per phoneme of target [B, T], given the phonemes before each."""
        memory, state = self.encode(source, length)
        before = F.pad(target[:, :-1], (1, 0), value=BOS)
        logits, _, _ = self.decode(before, memory, state)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)

    def encode(self, source: Tensor, length: Tensor | None) -> tuple[Memory, State]:
        """(memory, the decoder's first state) of source [B, S]."""
        x = self.letters(source)
        if length is None:
            out, (h, c) = self.encoder(x)
        elif isinstance(self.encoder, fastseq.LSTM):
            out, (h, c) = self.encoder(x, lengths=length)
        else:
            packed, (h, c) = self.encoder(pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False))
            out, _ = pad_packed_sequence(packed, batch_first=True)
        mask = None if length is None else torch.arange(source.shape[1]) < length[:, None, None]
        memory = Memory(out, self.keys(out).transpose(1, 2), mask)
        return memory, (h[1::2], c[1::2])  # the backward direction has just read the word's beginning

    def decode(self, before: Tensor, memory: Memory, state: State) -> tuple[Tensor, State, Tensor]:
        """(logits [B, T, V], state, attention [B, T, S]) of the phonemes before each step [B, T]: one step or all."""
        h, c = state
        asked, (h_0, c_0) = self.asking(self.phonemes(before), (h[:1], c[:1]))
        scores = asked @ memory.keys
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, -torch.inf)
        attention = scores.softmax(-1)
        context = attention @ memory.out
        read, (h_1, c_1) = self.reading(torch.cat([asked, context], -1), (h[1:], c[1:]))
        features = torch.tanh(self.readout(torch.cat([read, context], -1)))
        return self.output(features), (torch.cat([h_0, h_1]), torch.cat([c_0, c_1])), attention

    @torch.inference_mode()
    def greedy(self, source: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        """(phonemes [B, T] with EOS, attention [B, T, S]): the likeliest phoneme at each step."""
        memory, state = self.encode(source, length)
        last = torch.full((len(source), 1), BOS)
        done = torch.zeros(len(source), dtype=torch.bool)
        steps, weights = [], []
        while len(steps) < self.config.limit and not done.all():
            logits, state, attention = self.decode(last, memory, state)
            last = logits.argmax(-1)
            done |= last[:, 0] == EOS
            steps.append(last)
            weights.append(attention)
        return torch.cat(steps, 1), torch.cat(weights, 1)

    def pronounce(self, words: list[str], size: int = 1024) -> list[tuple[str, ...]]:
        """The pronunciation of each word."""
        order = sorted(range(len(words)), key=lambda i: len(words[i]))  # words of one length share a batch
        result: list[tuple[str, ...]] = [()] * len(words)
        for start in range(0, len(words), size):
            rows = order[start : start + size]
            ids, _ = self.greedy(*spell([words[i] for i in rows], self.config.letters))
            for i, row in zip(rows, ids.tolist(), strict=True):
                result[i] = self.phonemes_of(row)
        return result

    def phonemes_of(self, ids: list[int]) -> tuple[str, ...]:
        """The phonemes before EOS."""
        end = ids.index(EOS) if EOS in ids else len(ids)
        return tuple(self.config.phonemes[i - SPECIAL] for i in ids[:end] if i >= SPECIAL)
