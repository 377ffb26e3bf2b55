"""Copying: a date as people write it -> 2026 - 11 - 29; years are not in the vocabulary, the decoder points at them.

python -m examples.recipes.dates      # "Thu , Apr 09 1993" -> 1993 - 04 - 09: the year is copied, the month is made
"""

from datetime import date

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import command, exact_match, fit, samples


class PointerGenerator(nn.Module):
    """See et al. 2017, eq. 9: with probability p_gen one of V words, else one of the source; V: an unknown one."""

    def __init__(self, words: int, hidden: int = 64) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(words + 1, hidden), nn.Linear(hidden, words)
        self.encoder = fastseq.Encoder(hidden, hidden // 2, bidirectional=True, embedding=self.embedding)
        self.decoder, self.gate = fastseq.Decoder.bahdanau(hidden, hidden, memory_size=hidden), nn.Linear(hidden, 1)

    def mix(self, out: Tensor, weights: Tensor, src: Tensor) -> Tensor:  # [B, T, H], [B, T, S], [B, S] -> [B, T, V + 1]
        p_gen, copied = self.gate(out).sigmoid(), weights @ torch.eye(self.embedding.num_embeddings)[src]
        return (nn.functional.pad(p_gen * self.output(out).softmax(-1), (0, 1)) + (1 - p_gen) * copied + 1e-9).log()

    def loss(self, src: Tensor, lengths: Tensor, tgt: Tensor) -> Tensor:
        out, _, weights = self.decoder(self.embedding(tgt[:, :-1]), self.encoder(src, lengths), need_weights=True)
        return nn.functional.nll_loss(self.mix(out, weights, src).mT, tgt[:, 1:], ignore_index=PAD)

    @torch.no_grad()
    def greedy(self, src: Tensor, lengths: Tensor, **ids: int) -> Tensor:
        def step(tokens: Tensor, state: fastseq.DecoderState) -> tuple[Tensor, fastseq.DecoderState]:
            out, state, weights = self.decoder.step(self.embedding(tokens), keys, state, need_weights=True)
            return self.mix(out[:, None], weights[:, None], src)[:, 0], state

        keys = self.decoder.prepare(memory := self.encoder(src, lengths))
        return fastseq.generate(step, self.decoder.init_state(memory), batch_size=len(src), **ids).sequences[:, 0]


def train(steps: int = 300, seed: int = 0) -> tuple[PointerGenerator, float, float]:
    """A model, the share of dates unseen in training that are right, and that of the commonest."""
    torch.manual_seed(seed)
    days = [date.fromordinal(693596 + n) for n in torch.randperm(73000)[:9000].tolist()]  # of 1900 to 2099
    forms = ["%d %B %Y", "%B %d , %Y", "%a , %b %d %Y", "%d . %m . %Y", "%m / %d / %Y", "%A %d . %B %Y", "%Y , %d %b"]
    texts = [(f"{d:{forms[n % 7]}}".split(), f"<bos> {d:%Y - %m - %d} <eos>".split()) for n, d in enumerate(days)]
    known = [word for pair in texts for text in pair for word in text if len(word) < 4 or word.isalpha()]
    ids = {word: n for n, word in enumerate(dict.fromkeys(["<pad>", "<bos>", "<eos>", *known]))}
    (src, lengths), (tgt, _) = (pad([[ids.get(w, len(ids)) for w in t] for t in s]) for s in zip(*texts, strict=True))
    model, batches = PointerGenerator(len(ids)), samples(torch.arange(1000, 9000), 64)
    fit(model, lambda i: model.loss(src[i], lengths[i], tgt[i]), batches, steps=steps, rate=8e-3)
    found = model.greedy(src[:1000], lengths[:1000], bos_id=BOS, eos_id=EOS, pad_id=PAD, max_new_tokens=6)
    return model, exact_match(found, tgt[:1000, 1:]), 1 / 1000


if __name__ == "__main__":
    print("dates right: {:.1%}; by the commonest: {:.1%}".format(*command(train)[1:]))
