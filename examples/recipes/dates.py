"""Copying: a date as people write it -> 2026-11-29, by an attention decoder that may point at the source.

python -m examples.recipes.dates      # "Thu, Apr 29 1993": the digits of day and year are there, April's are not
"""

from datetime import date

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import draws, fit

FORMATS = ["%d %B %Y", "%B %d, %Y", "%a, %b %d %Y", "%d.%m.%Y", "%m/%d/%Y", "%A %d. %B %Y", "%Y, %d %b"]


class PointerGenerator(nn.Module):
    """See et al. 2017: with probability p_gen a character (ASCII) of the decoder's own, else one that it attends to."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.output, self.gate, self.embedding = nn.Linear(hidden, 128), nn.Linear(hidden, 1), nn.Embedding(128, hidden)
        self.encoder = fastseq.Encoder(hidden, hidden // 2, bidirectional=True, embedding=self.embedding)
        self.decoder = fastseq.Decoder.bahdanau(hidden, hidden, memory_size=hidden)

    def mix(self, output: Tensor, weights: Tensor, src: Tensor) -> Tensor:
        """Eq. 9: log-probabilities [B, T, V], of the decoder's output [B, T, H] and weights [B, T, S]."""
        p_gen, copied = self.gate(output).sigmoid(), weights @ nn.functional.one_hot(src, 128).to(weights)
        return (p_gen * self.output(output).softmax(-1) + (1 - p_gen) * copied).clamp(min=1e-9).log()

    def loss(self, src: Tensor, lengths: Tensor, tgt: Tensor) -> Tensor:
        output, _, weights = self.decoder(self.embedding(tgt[:, :-1]), self.encoder(src, lengths), need_weights=True)
        return nn.functional.nll_loss(self.mix(output, weights, src).mT, tgt[:, 1:])  # all targets have one length

    def generate(self, src: Tensor, lengths: Tensor, **options: int) -> Tensor:
        keys = self.decoder.prepare(memory := self.encoder(src, lengths))

        def step(tokens: Tensor, state: fastseq.DecoderState) -> tuple[Tensor, fastseq.DecoderState]:
            output, state, weights = self.decoder.step(self.embedding(tokens), keys, state, need_weights=True)
            return self.mix(output[:, None], weights[:, None], src)[:, 0], state

        return fastseq.generate(step, self.decoder.init_state(memory), batch_size=len(src), **options).sequences[:, 0]


def train(steps: int = 400) -> tuple[PointerGenerator, float, float]:
    """A model, the share of dates unseen in training that are right to the last digit, and that of the commonest."""
    torch.manual_seed(0)
    days = [date.fromordinal(n) for n in (torch.randperm(73000)[:9000] + date(1900, 1, 1).toordinal()).tolist()]
    src, lengths = pad([list(day.strftime(FORMATS[n % len(FORMATS)]).encode()) for n, day in enumerate(days)])
    tgt, model = pad([[BOS, *day.isoformat().encode(), EOS] for day in days])[0], PointerGenerator()
    batches = draws(torch.arange(1000, 9000), 64)
    fit(model, lambda i: model.loss(src[i], lengths[i], tgt[i]), batches, steps=steps, rate=8e-3)
    found = model.generate(src[:1000], lengths[:1000], bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=11)
    return model, (found == tgt[:1000, 1 : 1 + found.shape[1]]).all(1).float().mean().item(), 1 / 1000


if __name__ == "__main__":
    print("dates right: {:.1%}; the commonest: {:.1%}".format(*train()[1:]))
