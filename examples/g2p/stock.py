"""The same model built from torch.nn alone, as one would without fastseq: what training is timed against.

Every recurrent layer runs over the whole sequence in one call, rows of different lengths are packed, and the attention
of all steps is two products. The parameters have the names that they have in fastseq's: either reads the other's.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD
from ..training.stock import Encoder, between, name_as_fastseq

State = list[tuple[Tensor, Tensor]]  # (h, c), each [B, H], of every layer


class Memory(NamedTuple):
    """What the decoder reads of the source."""

    out: Tensor  # [B, S, 2H]
    keys: Tensor  # [B, H, S]
    mask: Tensor | None  # [B, 1, S], True = attend; None = all


class StockModel(nn.Module):
    """A model of `build` from torch.nn, with its parameters at first; `loss` and `generate` are called alike."""

    def __init__(self, model: fastseq.Seq2Seq) -> None:
        super().__init__()
        size, layers = model.decoder.hidden_size, model.decoder.num_layers
        self.extra = model.extra
        self.encoder = Encoder(model.encoder)
        self.decoder = Decoder(size, layers, model.decoder.output_dropout)
        self.embedding, self.output = copy.deepcopy(model.embedding), copy.deepcopy(model.output)
        self.load_state_dict(model.state_dict())

    def loss(
        self,
        source: Tensor,  # [B, S]
        target: Tensor,  # [B, T + 1]: BOS ... EOS, then PAD
        length: Tensor | None = None,  # [B]; None: all S
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy per phoneme, given the phonemes before each."""
        memory, state = self.read(source, length)
        features, _ = self.decoder(self.embedding(target[:, :-1]), memory, state)
        logits, wanted = self.output(features).flatten(0, 1), target[:, 1:].flatten()
        return F.cross_entropy(logits, wanted, ignore_index=PAD, label_smoothing=label_smoothing)

    def generate(self, source: Tensor, length: Tensor | None = None, **options: Any) -> fastseq.GenerateOutput:
        """fastseq.generate with this model's step; the memory is in the state, so that beams may repeat its rows."""

        def step(tokens: Tensor, state: tuple[Memory, State]) -> tuple[Tensor, tuple[Memory, State]]:
            features, last = self.decoder(self.embedding(tokens)[:, None], *state)
            return self.output(features[:, 0]), (state[0], last)

        with torch.no_grad():
            start = self.read(source, length)
        return fastseq.generate(
            step, start, batch_size=len(source), bos_id=BOS, eos_id=EOS, pad_id=PAD, **options
        )  # fmt: skip

    def read(self, source: Tensor, length: Tensor | None) -> tuple[Memory, State]:
        """The source as the decoder wants it, and the decoder's first state."""
        out, mask, states = self.encoder(source, length)
        state = [(h[1], c[1]) for h, c in states]  # the backward direction's
        return Memory(out, self.decoder.keys(out).transpose(1, 2), None if mask is None else mask[:, None]), state


class Decoder(nn.Module):
    """LSTM layers, of which the first asks and the others read what was found."""

    def __init__(self, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.size, self.dropout = size, dropout
        self.layers = nn.ModuleList(
            nn.LSTM(size if index == 0 else 3 * size, size, batch_first=True) for index in range(layers)
        )
        self.keys = nn.Linear(2 * size, size, bias=False)
        self.readout = nn.Linear(3 * size, size)
        name_as_fastseq(self)

    def forward(self, y: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
        """(features [B, T, H], state) of y [B, T, H]."""
        noise = between(y, len(self.layers), self.size, self.dropout, self.training)
        out, last = self.run(0, y, state)
        states = [last]
        scores = out @ memory.keys
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, -torch.inf)
        context = scores.softmax(-1) @ memory.out
        for index in range(1, len(self.layers)):
            out = out if noise is None else out * noise[index - 1]
            out, last = self.run(index, torch.cat([out, context], -1), state)
            states.append(last)
        features = torch.tanh(self.readout(torch.cat([out, context], -1)))
        return F.dropout(features, self.dropout, self.training), states

    def run(self, index: int, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A layer's output [B, T, H] and last state."""
        h, c = state[index]
        out, (h, c) = self.layers[index](x, (h[None], c[None]))
        return out, (h[0], c[0])
