"""A step of a greedy search that stays on a GPU, for `chunked_search` to repeat. Letters as in `decoder_search`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .decoder_search import Found, Search, Vocabulary

__all__ = ["Rows", "Run", "State", "log_probabilities"]

State = tuple[Tensor, ...]
# (y [N, T, I], state) -> (output [N, R] of the last step, state, weights [N, T, S] or None)
Run = Callable[[Tensor, State], tuple[Tensor, State, Tensor | None]]


class Rows(NamedTuple):
    """What a step changes, in place."""

    tokens: Tensor  # [N] int64: what each row reads next
    total: Tensor  # [N]: the log-probability of its new tokens, fp32
    lengths: Tensor  # [N] int64: how many they are
    running: Tensor  # [N] bool
    wrong: Tensor  # [] bool: a logit of a row that runs was NaN or +inf
    at: Tensor  # [1] int64: new tokens so far
    ids: Tensor  # [N, most new ones]
    weights: Tensor | None  # [N, as ids, S]

    @classmethod
    def begin(cls, search: Search, of: Vocabulary, source: int) -> "Rows":
        tokens = search.prefix[:, -1].clone()
        (batch,), most = tokens.shape, len(search.norms) - 1
        return cls(
            tokens, tokens.new_zeros(batch, dtype=torch.float32), torch.zeros_like(tokens),
            torch.ones_like(tokens, dtype=torch.bool), tokens.new_zeros((), dtype=torch.bool), tokens.new_zeros(1),
            tokens.new_full((batch, most), search.pad_id),
            of.weight.new_zeros(batch, most, source) if search.need_weights else None,
        )  # fmt: skip

    def step(self, run: Run, state: State, of: Vocabulary, search: Search) -> None:
        """The next token of every row that runs."""
        output, new, weights = run(of.embedding[self.tokens][:, None], state)
        for leaf, value in zip(state, new, strict=True):
            leaf.copy_(value)
        scores, wrong = log_probabilities(output, of, search, self.at, self.running)
        self.wrong.logical_or_(wrong)
        best, token = scores.max(-1)
        runs = self.running & (best > -torch.inf)  # a row with nothing that may come ends
        stands = ~runs
        self.total.add_(best.masked_fill_(stands, 0))
        self.tokens.copy_(token.masked_fill_(stands, search.pad_id))
        self.ids.index_copy_(1, self.at, token[:, None])
        if self.weights is not None and weights is not None:
            self.weights.index_copy_(1, self.at, weights.masked_fill(stands[:, None, None], 0))
        self.lengths.add_(runs)
        self.running.copy_(runs & (token != search.eos_id))
        self.at.add_(1)

    def found(self, of: Vocabulary, search: Search) -> Found:
        """The tokens of each row, forced ones before them; without weights."""
        tokens = torch.cat((search.prefix[:, 1:], self.ids), 1)[:, None]
        norms = torch.tensor(search.norms, dtype=torch.float32, device=self.total.device)
        lengths = (self.lengths + search.prefix.shape[1] - 1)[:, None]
        scores = (self.total / norms[self.lengths])[:, None]
        return Found(tokens, lengths, scores, torch.zeros_like(tokens), None, bool(self.wrong))


def log_probabilities(
    output: Tensor,  # [N, R]
    of: Vocabulary,
    search: Search,
    at: Tensor,  # [1]: new tokens so far
    running: Tensor,  # [N] bool
) -> tuple[Tensor, Tensor]:
    """Of the next token [N, V] in fp32, -inf for what may not come; whether a row that runs has NaN or +inf [].

    Of such a row nothing may come.
    """
    logits = linear(output, of.weight, of.bias).float()
    most = logits.amax(-1)  # NaN beside a NaN; -inf where nothing may come, of which the softmax would make NaN
    scores = logits.log_softmax(-1).masked_fill_(~(most.abs() < torch.inf)[:, None], -torch.inf)
    if search.min_new_tokens:
        scores[:, search.eos_id].masked_fill_(at < search.min_new_tokens, -torch.inf)
    return scores, (~(most < torch.inf) & running).any()
