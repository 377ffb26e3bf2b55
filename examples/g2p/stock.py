"""The same model built from torch.nn alone, as one would without fastseq: what training is timed against.

Every recurrent layer runs over the whole sequence in one call, rows of different lengths are packed, and the attention
of all steps is two products. The parameters have the names that they have in `Model`: either reads the other's.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .model import Model

State = list[tuple[Tensor, Tensor]]  # (h, c), each [1, B, H], of every layer


class Memory(NamedTuple):
    """What the decoder reads of the source."""

    out: Tensor  # [B, S, 2H]
    mask: Tensor | None  # [B, 1, S], True = attend; None = all
    state: State  # of the backward direction


class Keys(NamedTuple):
    """A memory with its projection, made once and not at every step."""

    keys: Tensor  # [B, H, S]
    memory: Memory


class StockModel(Model):
    """`Model` from torch.nn."""

    def parts(self, size: int, layers: int) -> tuple[nn.Module, nn.Module]:
        return Encoder(size, layers), Decoder(size, layers)


class Encoder(nn.Module):
    """Bidirectional LSTM layers."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.LSTM(size if index == 0 else 2 * size, size, batch_first=True, bidirectional=True)
            for index in range(layers)
        )

    def forward(self, x: Tensor, length: Tensor | None) -> Memory:
        out: Any = x
        if length is not None:
            out = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
        state = []
        for layer in self.layers:
            out, (h, c) = layer(out)
            state.append((h[1:], c[1:]))
        if length is None:
            return Memory(out, None, state)
        out, _ = pad_packed_sequence(out, batch_first=True)
        return Memory(out, torch.arange(x.shape[1]) < length[:, None, None], state)


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

    def prepare(self, memory: Memory) -> Keys:
        return Keys(self.keys(memory.out).transpose(1, 2), memory)

    def init_state(self, memory: Memory) -> State:
        return memory.state

    def forward(self, y: Tensor, memory: Memory) -> tuple[Tensor, State, Tensor]:
        """(features [B, T, H], state, attention [B, T, S]) of y [B, T, H]."""
        return self.decode(y, self.prepare(memory), memory.state)

    def step(self, y: Tensor, keys: Keys, state: State, *, need_weights: bool) -> tuple[Tensor, State, Tensor]:
        """The same of one step, y [B, H]."""
        features, state, attention = self.decode(y[:, None], keys, state)
        return features[:, 0], state, attention[:, 0]

    def decode(self, y: Tensor, keys: Keys, state: State) -> tuple[Tensor, State, Tensor]:
        out, last = self.layers[0](y, state[0])
        states = [last]
        scores = out @ keys.keys
        if keys.memory.mask is not None:
            scores = scores.masked_fill(~keys.memory.mask, -torch.inf)
        attention = scores.softmax(-1)
        context = attention @ keys.memory.out
        for layer, first in zip(self.layers[1:], state[1:], strict=True):
            out, last = layer(torch.cat([out, context], -1), first)
            states.append(last)
        return torch.tanh(self.readout(torch.cat([out, context], -1))), states, attention


def _to_fastseq(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Name the parameters as fastseq.Decoder does."""
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :].replace("keys.weight", "attention.weight_memory")
        state[prefix + re.sub(r"^layers\.(\d+)\.(\w+)_l0$", r"\2_l\1", own)] = state.pop(name)


def _from_fastseq(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :].replace("attention.weight_memory", "keys.weight")
        state[prefix + re.sub(r"^(\w+)_l(\d+)$", r"layers.\2.\1_l0", own)] = state.pop(name)
