"""The same model built from torch.nn alone, as one would without fastseq: what training is timed against.

Every recurrent layer runs over the whole sequence in one call, rows of different lengths are packed, and the attention
of all steps is two products. The parameters have the names that they have in fastseq's: either reads the other's.
"""

import copy
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

from .data import BOS, EOS, PAD

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
        self.encoder = Encoder(copy.deepcopy(model.encoder.embedding), size, layers)
        self.decoder = Decoder(size, layers)
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
        out, mask, state = self.encoder(source, length)
        return Memory(out, self.decoder.keys(out).transpose(1, 2), mask), state


class Encoder(nn.Module):
    """Bidirectional LSTM layers."""

    def __init__(self, embedding: nn.Module, size: int, layers: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(
            nn.LSTM(size if index == 0 else 2 * size, size, batch_first=True, bidirectional=True)
            for index in range(layers)
        )

    def forward(
        self,
        source: Tensor,  # [B, S]
        length: Tensor | None,  # [B]
    ) -> tuple[Tensor, Tensor | None, State]:
        """(output [B, S, 2H], mask [B, 1, S], the backward direction's last state)."""
        out: Any = self.embedding(source)
        if length is not None:
            out = pack_padded_sequence(out, length, batch_first=True, enforce_sorted=False)
        state = []
        for layer in self.layers:
            out, (h, c) = layer(out)
            state.append((h[1], c[1]))
        if length is None:
            return out, None, state
        out, _ = pad_packed_sequence(out, batch_first=True)
        return out, torch.arange(source.shape[1]) < length[:, None, None], state


class Decoder(nn.Module):
    """LSTM layers, of which the first asks and the others read what was found."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.LSTM(size if index == 0 else 3 * size, size, batch_first=True) for index in range(layers)
        )
        self.keys = nn.Linear(2 * size, size, bias=False)
        self.readout = nn.Linear(3 * size, size)
        self.register_state_dict_post_hook(_to_fastseq)
        self.register_load_state_dict_pre_hook(_from_fastseq)

    def forward(self, y: Tensor, memory: Memory, state: State) -> tuple[Tensor, State]:
        """(features [B, T, H], state) of y [B, T, H]."""
        out, last = self.run(0, y, state)
        states = [last]
        scores = out @ memory.keys
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, -torch.inf)
        context = scores.softmax(-1) @ memory.out
        for index in range(1, len(self.layers)):
            out, last = self.run(index, torch.cat([out, context], -1), state)
            states.append(last)
        return torch.tanh(self.readout(torch.cat([out, context], -1))), states

    def run(self, index: int, x: Tensor, state: State) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A layer's output [B, T, H] and last state."""
        h, c = state[index]
        out, (h, c) = self.layers[index](x, (h[None], c[None]))
        return out, (h[0], c[0])


def _to_fastseq(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Name the parameters as fastseq.Decoder does."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :].replace("keys.weight", "attention.weight_memory")
        state[prefix + re.sub(r"^layers\.(\d+)\.(\w+)_l0$", r"\2_l\1", own)] = state.pop(name)


def _from_fastseq(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :].replace("attention.weight_memory", "keys.weight")
        state[prefix + re.sub(r"^(\w+)_l(\d+)$", r"layers.\2.\1_l0", own)] = state.pop(name)
