"""JoeyNMT's own recurrent decoder, as the models of `toolkits` are called."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.joey import joeynmt
from fastseq.spec import DropoutMasks, Memory
from tests.oracle import Results
from tests.toolkits import Sizes, gathered

__all__ = ["Joey"]


class Factors(nn.Module):
    """In the place of a dropout: the factors given, one step after another."""

    def __init__(self, factors: Tensor | None) -> None:
        super().__init__()
        self.factors, self.step = factors, 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return x if self.factors is None else x * self.factors[:, self.step - 1, None]


class Joey(nn.Module):
    """JoeyNMT's own RecurrentDecoder; A = R = H."""

    def __init__(self, n: Sizes, cell: str = "lstm", **options: object) -> None:
        super().__init__()
        encoder = SimpleNamespace(output_size=n.D)  # nothing else of it is asked for
        self.decoder = joeynmt("decoders").RecurrentDecoder(
            rnn_type=cell, emb_size=n.I, hidden_size=n.H, encoder=encoder, num_layers=n.L, vocab_size=1, **options
        )

    def forward(self, y: Tensor, memory: Memory, masks: DropoutMasks) -> Results:
        self.decoder.hidden_dropout = Factors(masks.readout)
        mask = torch.ones_like(memory.out[:, :, 0], dtype=torch.bool) if memory.mask is None else memory.mask
        _, hidden, weights, vectors = self.decoder(y, memory.out, memory.state[-1][0], mask[:, None], y.shape[1])
        leaves = hidden if isinstance(hidden, tuple) else (hidden,)
        layers = list(zip(*(leaf.unbind(1) for leaf in leaves), strict=True))
        feed = vectors[:, -1] if self.decoder.input_feeding else None
        return gathered(vectors.unbind(1), weights.unbind(1), layers, feed)
