"""A step of a beam search that stays on a GPU, for `chunked_search` to repeat. Letters as in `decoder_search`.

The rules are those of fastseq/generation/search.py. Which of equal scores comes first is torch.topk's choice, of which
PyTorch promises nothing; it is asked for the same as there, so that of equal logits both searches find the same, but
for scores that differ by the rounding of a division.

A step of a row is stored as a link, parent * V + token: the row, of the k, whose step chose the token, and the token.
Nothing that was found is moved when beams change their rows: the paths are read backwards at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .chunked_greedy import Run, State, log_probabilities
from .decoder_search import Found, Search, Vocabulary

__all__ = ["Beams"]


class Beams(NamedTuple):
    """What a step changes, in place; and what it reads of the search."""

    tokens: Tensor  # [N] int64: what each row reads next
    total: Tensor  # [B, k]: the log-probability of its new tokens, fp32, the likeliest first; -inf: it goes on no more
    links: Tensor  # [most new tokens, B, k] int64
    finished: Tensor  # [B, k]: final scores of whole hypotheses, the best first; -inf: there are fewer
    last: Tensor  # [B, k] int64: the step of their last token * k * V + its link
    wrong: Tensor  # [] bool: a logit of a row that runs was NaN or +inf
    at: Tensor  # [1] int64: new tokens so far
    weights: Tensor | None  # [N, as links, S], of the rows as they were at each step

    norms: Tensor  # [as links]: what a hypothesis of 1, 2, ... new tokens is divided by
    first: Tensor  # [B, 1] int64: of each memory row's k rows of N
    counted: Tensor  # [2 k] bool: of the likeliest continuations the first k, which may end

    @classmethod
    def begin(cls, search: Search, of: Vocabulary, source: int) -> "Beams":
        batch, k, most = len(search.prefix), search.copies, len(search.norms) - 1
        tokens = search.prefix[:, -1:].expand(batch, k).flatten()
        links = tokens.new_zeros(most, batch, k)
        none = torch.full_like(links[0], -torch.inf, dtype=torch.float32)
        total = none.clone()
        total[:, 0] = 0  # all beams are the same so far
        ranks = torch.arange(min(2 * k, k * len(of.weight)), device=tokens.device)
        return cls(
            tokens, total, links, none, torch.zeros_like(links[0]), tokens.new_zeros((), dtype=torch.bool),
            tokens.new_zeros(1), of.weight.new_zeros(batch * k, most, source) if search.need_weights else None,
            torch.tensor(search.norms[1:], dtype=torch.float32, device=tokens.device),
            torch.arange(0, batch * k, k, device=tokens.device)[:, None], ranks < k,
        )  # fmt: skip

    @property
    def running(self) -> Tensor:
        """[B, k] bool."""
        return self.total > -torch.inf

    def step(self, run: Run, state: State, of: Vocabulary, search: Search) -> None:
        """Of the 2 k likeliest continuations those of the first k that end are finished, and k others go on."""
        output, new, weights = run(of.embedding[self.tokens][:, None], state)
        scores, wrong = log_probabilities(output, of, search, self.at, self.running.flatten())
        self.wrong.logical_or_(wrong)
        if self.weights is not None and weights is not None:
            self.weights.index_copy_(1, self.at, weights)
        every = scores.unflatten(0, self.total.shape).add_(self.total[:, :, None]).flatten(1)
        best, link = every.topk(len(self.counted), 1)
        ends = link % len(of.weight) == search.eos_id
        norm = self.norms.index_select(0, self.at)
        self._finish((best / norm).masked_fill_(~(ends & self.counted), -torch.inf), link + self.at * every.shape[1])
        total, rank = best.masked_fill_(ends, -torch.inf).topk(search.copies, 1)
        link = link.gather(1, rank)
        self.total.copy_(total.masked_fill_(self._done(total[:, :1], norm, search), -torch.inf))
        self.links.index_copy_(0, self.at, link[None])
        self.tokens.copy_((link % len(of.weight)).flatten())
        rows = (self.first + link // len(of.weight)).flatten()
        for leaf, value in zip(state, new, strict=True):
            torch.index_select(value, 0, rows, out=leaf)
        self.at.add_(1)

    def _finish(self, scores: Tensor, last: Tensor) -> None:
        """The k best of those that are finished and the given ones [B, 2 k], of which those of -inf are none."""
        best, index = torch.cat((self.finished, scores), 1).topk(self.finished.shape[1], 1)
        self.last.copy_(torch.cat((self.last, last), 1).gather(1, index))
        self.finished.copy_(best)

    def _done(self, best: Tensor, norm: Tensor, search: Search) -> Tensor:
        """[B, 1]: k are finished and, but for early_stopping=True, the best beam [B, 1] would beat none of them."""
        worst = self.finished[:, -1:]
        full = worst > -torch.inf
        if search.early_stopping is True:
            return full
        longest = search.early_stopping == "never" and search.rewards_length
        return full & (worst >= best / (self.norms[-1:] if longest else norm))

    def found(self, of: Vocabulary, search: Search) -> Found:
        """The best hypotheses, finished or cut off by the most tokens, over the steps that ran; without weights."""
        steps, past, k, V = int(self.at), search.prefix.shape[1] - 1, search.copies, len(of.weight)
        links = self.links[:steps]
        scores, best = torch.cat((self.finished, self.total / self.norms[steps - 1]), 1).topk(search.returned, 1)
        last = torch.cat((self.last, links[-1] + (steps - 1) * k * V), 1).gather(1, best)
        lengths = torch.where(scores > -torch.inf, last // (k * V) + past + 1, 0)
        links = _paths(links, last // (k * V), last % (k * V), V)
        there = torch.arange(past + steps, device=links.device) < lengths[:, :, None]
        forced = search.prefix[:, None, 1:].expand(-1, search.returned, -1)
        tokens = torch.where(there, torch.cat((forced, links % V), 2), search.pad_id)
        trail = torch.where(there, pad(links // V, (past, 0)), 0)
        return Found(tokens, lengths, scores, trail, None, bool(self.wrong))


def _paths(
    links: Tensor,  # [T, B, k]
    step: Tensor,  # [B, R]
    last: Tensor,  # [B, R]
    V: int,
) -> Tensor:
    """Links [B, R, T] that lead to hypotheses with the link `last` at `step`; behind it, anything.

    Beside the k rows a hypothesis has a column of its own, where it waits until its last step, going backwards, takes
    it to a row. Where a step leads from, put into where the one before it leads from, is a step of two; of these are
    made steps of four, and so on: as many passes as T has bits.
    """
    (steps, batch, k), returned = links.shape, step.shape[1]
    columns = torch.arange(k, k + returned, device=links.device).expand(1, batch, -1)
    times = torch.arange(steps, device=links.device)[:, None, None]
    came = torch.cat((links // V, torch.where(times == step, last // V, columns)), 2)  # [T, B, k + R]
    reach = 1
    while reach < steps:  # came[t]: where each row and column was before step t, from the end of step t + reach - 1 on
        came = torch.cat((came[:-reach].gather(2, came[reach:]), came[-reach:]))
        reach *= 2
    stood = torch.cat((came[1:, :, k:], columns))  # after each step
    return torch.cat((links, last.expand(steps, -1, -1)), 2).gather(2, stood).permute(1, 2, 0)
