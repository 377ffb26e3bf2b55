"""An attention encoder and decoder: letters to phonemes.

The encoder is bidirectional. The decoder attends between its layers (as GNMT does, Wu et al. 2016): the first layer
asks (Luong et al. 2015, the general score), the layers above read the state below and the context it found. No context
flows back to the layer that asks, so in training nothing needs a loop over steps but the recurrences themselves.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq

from .data import BOS, EOS, PAD, SPECIAL, spell


@dataclass(frozen=True)
class Config:
    """All that builds a model: stored in the checkpoint."""

    letters: list[str]
    phonemes: list[str]
    hidden: int = 64  # units of a layer and direction, and of the embeddings
    layers: int = 2
    limit: int = 40  # phonemes of a pronunciation, at most


class Model(nn.Module):
    """Letters to phonemes, from fastseq's Encoder and Decoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.layers < 2:
            raise ValueError(f"layers={config.layers}: the decoder attends between layers, it needs two or more")
        self.config, size = config, config.hidden
        self.letters = nn.Embedding(len(config.letters) + SPECIAL, size, padding_idx=PAD)
        self.phonemes = nn.Embedding(len(config.phonemes) + SPECIAL, size, padding_idx=PAD)
        self.encoder, self.decoder = self.parts(size, config.layers)
        self.output = nn.Linear(size, len(config.phonemes) + SPECIAL)

    def parts(self, size: int, layers: int) -> tuple[nn.Module, nn.Module]:
        """The encoder and the decoder."""
        encoder = fastseq.Encoder(size, size, layers, bidirectional=True)
        decoder = fastseq.Decoder(
            size, size, layers, attention="general", memory_size=encoder.output_size,
            attend="after", query_layer=0, context_to="upper", readout=("state", "context"), combine_bias=True,
            bridge=fastseq.Bridge("backward"),  # that direction has just read the word's beginning
        )  # fmt: skip
        return encoder, decoder

    def loss(self, source: Tensor, length: Tensor | None, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy per phoneme of target [B, T], given the phonemes before each."""
        before = F.pad(target[:, :-1], (1, 0), value=BOS)
        features, _, _ = self.decoder(self.phonemes(before), self.encoder(self.letters(source), length))
        logits = self.output(features)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)

    @torch.inference_mode()
    def greedy(self, source: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        """(phonemes [B, T] with EOS, attention [B, T, S]): the likeliest phoneme at each step."""
        memory = self.encoder(self.letters(source), length)
        keys, state = self.decoder.prepare(memory), self.decoder.init_state(memory)
        last = torch.full((len(source),), BOS)
        done = torch.zeros(len(source), dtype=torch.bool)
        steps, weights = [], []
        while len(steps) < self.config.limit and not done.all():
            features, state, attention = self.decoder.step(self.phonemes(last), keys, state, need_weights=True)
            last = self.output(features).argmax(-1)
            done |= last == EOS
            steps.append(last)
            weights.append(attention)
        return torch.stack(steps, 1), torch.stack(weights, 1)

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
