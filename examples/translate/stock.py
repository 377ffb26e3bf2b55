"""The four models from torch.nn alone, as a careful user writes them: what training is timed against.

Where no step needs the attention of the step before, a layer runs over the whole sequence in one call; else there is a
loop over cells, outside of which the memory is projected once and all readouts are one product. Rows of different
lengths are packed. The parameters have the names that they have in fastseq's: either reads the other's.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD
from ..training.stock import Encoder, between, name_as_fastseq


class Memory(NamedTuple):
    """What a decoder with attention reads of the source."""

    out: Tensor  # [B, S, D]
    keys: Tensor  # [B, S, A]
    mask: Tensor | None  # [B, S], True = attend; None = all

    def context(self, scores: Tensor) -> Tensor:
        """[B, S] -> [B, D]."""
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, -torch.inf)
        return torch.bmm(scores.softmax(-1)[:, None], self.out)[:, 0]


class Dropout(NamedTuple):
    """Probabilities: on the embedded target, between layers, on the result."""

    input: float
    layers: float
    output: float


class Sutskever(nn.Module):
    """LSTM layers from the encoder's last states."""

    def __init__(self, model: fastseq.Decoder, drop: Dropout) -> None:
        super().__init__()
        self.size, self.drop = model.hidden_size, drop
        self.layers = nn.ModuleList(
            nn.LSTM(self.size if index else model.input_size, self.size, batch_first=True)
            for index in range(model.num_layers)
        )
        name_as_fastseq(self)

    def start(self, out: Tensor, mask: Tensor | None, states: list[Any]) -> tuple[None, list[Any]]:
        """(memory, first state) of the encoder's results."""
        return None, [(h[0], c[0]) for h, c in states]

    def forward(self, y: Tensor, memory: None, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """(features [B, T, R], state) of y [B, T, I]."""
        out = F.dropout(y, self.drop.input, self.training)
        noise, last = between(y, len(self.layers), self.size, self.drop.layers, self.training), []
        for index, (layer, (h, c)) in enumerate(zip(self.layers, state, strict=True)):
            if index and noise is not None:
                out = out * noise[index - 1]
            out, (h, c) = layer(out, (h[None], c[None]))
            last.append((h[0], c[0]))
        return F.dropout(out.contiguous(), self.drop.output, self.training), last  # drawn in the order of memory


class Cho(nn.Module):
    """A GRU that reads the source's vector c at every step."""

    def __init__(self, model: fastseq.Decoder, drop: Dropout) -> None:
        super().__init__()
        self.drop, size = drop, model.hidden_size
        self.summary = copy.deepcopy(model.summary)
        self.bridge = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(size, size)])})
        self.layers = nn.ModuleList([nn.GRU(model.input_size + size, size, batch_first=True)])
        self.readout = copy.deepcopy(model.readout)
        name_as_fastseq(self)

    def start(self, out: Tensor, mask: Tensor | None, states: list[Any]) -> tuple[Tensor, Tensor]:
        """(c [B, H], first state [B, H])."""
        context = torch.tanh(self.summary(states[-1][0]))
        return context, torch.tanh(self.bridge["h"][0](context))

    def forward(self, y: Tensor, memory: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, T, R], state) of y [B, T, I]."""
        y = F.dropout(y, self.drop.input, self.training)
        context = memory[:, None].expand(-1, y.shape[1], -1)
        out, last = self.layers[0](torch.cat([y, context], -1), state[None])
        features = maxout(self.readout(torch.cat([out, y, context], -1)))
        return F.dropout(features, self.drop.output, self.training), last[0]


class Bahdanau(nn.Module):
    """The additive score of the state before, then a GRU's cell."""

    def __init__(self, model: fastseq.Decoder, drop: Dropout) -> None:
        super().__init__()
        self.drop, size, memory = drop, model.hidden_size, model.memory_size
        self.keys, self.query = nn.Linear(memory, size, bias=False), nn.Linear(size, size, bias=False)
        self.v = nn.Parameter(torch.empty(size))
        self.bridge = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(memory // 2, size)])})
        self.cells = nn.ModuleList([nn.GRUCell(model.input_size + memory, size)])
        self.readout = copy.deepcopy(model.readout)
        name_as_fastseq(self)

    def start(self, out: Tensor, mask: Tensor | None, states: list[Any]) -> tuple[Memory, Tensor]:
        """(memory, first state [B, H])."""
        return Memory(out, self.keys(out), mask), torch.tanh(self.bridge["h"][0](states[-1][1]))

    def forward(self, y: Tensor, memory: Memory, state: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, T, R], state) of y [B, T, I]."""
        y = F.dropout(y, self.drop.input, self.training)
        before, contexts, cell = [], [], self.cells[0]
        for y_t in y.unbind(1):
            context = memory.context(torch.tanh(memory.keys + self.query(state)[:, None]) @ self.v)
            before.append(state)
            contexts.append(context)
            state = cell(torch.cat([y_t, context], -1), state)
        parts = torch.cat([torch.stack(before, 1), y, torch.stack(contexts, 1)], -1)
        return F.dropout(maxout(self.readout(parts)), self.drop.output, self.training), state


class Luong(nn.Module):
    """LSTM cells, the general score, and an attentional state that joins the next input."""

    def __init__(self, model: fastseq.Decoder, drop: Dropout) -> None:
        super().__init__()
        self.drop, self.size, self.fed = drop, model.hidden_size, model.output_size
        size, memory, layers = self.size, model.memory_size, range(model.num_layers)
        self.cells = nn.ModuleList(nn.LSTMCell(size if n else model.input_size + self.fed, size) for n in layers)
        self.keys = nn.Linear(memory, size, bias=False)
        self.bridge = nn.ModuleDict({k: nn.ModuleList(nn.Linear(memory, size) for _ in layers) for k in "hc"})
        self.readout = copy.deepcopy(model.readout)
        name_as_fastseq(self)

    def start(self, out: Tensor, mask: Tensor | None, states: list[Any]) -> tuple[Memory, tuple[list[Any], Tensor]]:
        """(memory, (each layer's first state, what is fed))."""
        layers = []
        for n, state in enumerate(states):
            h, c = (self.bridge[k][n](torch.cat([*leaf], -1)) for k, leaf in zip("hc", state, strict=True))
            layers.append((h, c))
        return Memory(out, self.keys(out), mask), (layers, out.new_zeros(len(out), self.fed))

    def forward(
        self, y: Tensor, memory: Memory, state: tuple[list[Any], Tensor]
    ) -> tuple[Tensor, tuple[list[Any], Tensor]]:
        """(features [B, T, R], state) of y [B, T, I]."""
        y = F.dropout(y, self.drop.input, self.training)
        noise = between(y, len(self.cells), self.size, self.drop.layers, self.training)
        kept = F.dropout(y.new_ones(*y.shape[:2], self.fed), self.drop.output, self.training)
        (layers, fed), features = state, []
        for t, y_t in enumerate(y.unbind(1)):
            below, after = torch.cat([y_t, fed], -1), []
            for n, (cell, layer) in enumerate(zip(self.cells, layers, strict=True)):
                h, c = cell(below if not n or noise is None else below * noise[n - 1, :, t], layer)
                after.append((h, c))
                below = h
            context = memory.context(torch.bmm(memory.keys, below[:, :, None])[:, :, 0])
            fed, layers = torch.tanh(self.readout(torch.cat([context, below], -1))) * kept[:, t], after
            features.append(fed)
        return torch.stack(features, 1), (layers, fed)


def maxout(x: Tensor) -> Tensor:
    """[..., 2 R] -> [..., R]: the larger of each two neighbours (Goodfellow et al. 2013)."""
    return x.unflatten(-1, (-1, 2)).amax(-1)


DECODERS = {"sutskever": Sutskever, "cho": Cho, "bahdanau": Bahdanau, "luong": Luong}


class StockModel(nn.Module):
    """A model of `build` from torch.nn, with its parameters at first; `loss` and `generate` are called alike."""

    def __init__(self, model: fastseq.Seq2Seq) -> None:
        super().__init__()
        decoder, self.extra = model.decoder, model.extra
        drop = Dropout(decoder.input_dropout, decoder.dropout, decoder.output_dropout)
        self.encoder = Encoder(model.encoder)
        self.decoder = DECODERS[self.extra["paper"]](decoder, drop)
        self.embedding, self.output = copy.deepcopy(model.embedding), copy.deepcopy(model.output)
        if model.tie is not None:
            self.output.weight = self.embedding.weight
        self.load_state_dict(model.state_dict())

    def loss(
        self,
        source: Tensor,  # [B, S]
        target: Tensor,  # [B, T + 1]: BOS ... EOS, then PAD
        length: Tensor | None = None,  # [B]; None: all S
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy per word, given the words before each."""
        memory, state = self.decoder.start(*self.encoder(source, length))
        features, _ = self.decoder(self.embedding(target[:, :-1]), memory, state)
        wanted, real = target[:, 1:], target[:, 1:] != PAD
        return F.cross_entropy(self.output(features[real]), wanted[real], label_smoothing=label_smoothing)

    def generate(self, source: Tensor, length: Tensor | None = None, **options: Any) -> fastseq.GenerateOutput:
        """fastseq.generate with this model's step; the memory is in the state, so that beams may repeat its rows."""

        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            features, last = self.decoder(self.embedding(tokens)[:, None], *state)
            return self.output(features[:, 0]), (state[0], last)

        with torch.no_grad():
            start = self.decoder.start(*self.encoder(source, length))
            return fastseq.generate(
                step, start, batch_size=len(source), bos_id=BOS, eos_id=EOS, pad_id=PAD, **options
            )  # fmt: skip
