"""The peer of `generate`: greedy and beam search over a batch as a careful PyTorch user writes them, without gradients.

The keys are projected once, cells are torch.nn's, beams share the memory, and what finished hypotheses need is done in
steps alone that find or have one. Scores are log-probabilities over lengths, as fastseq's by default.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from .decoder_loop import CELLS

__all__ = ["BOS", "EOS", "PAD", "BahdanauSearch", "LuongSearch", "SearchLoop"]

PAD, BOS, EOS = 0, 1, 2

State = list[Tensor]  # each [N, H], N = B * k
Read = tuple[Tensor, Tensor, Tensor]  # keys, memory [B, S, H], and True [B, 1, S] where nothing is attended to


class SearchLoop(nn.Module, ABC):
    """Searches with any decoder's step."""

    def __init__(self, cell: str, hidden: int, vocabulary: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.lstm, self.hidden, self.vocabulary = cell == "lstm", hidden, vocabulary
        self.embedding = nn.Embedding(vocabulary, hidden, dtype=dtype)
        self.cell = CELLS[cell](2 * hidden, hidden, dtype=dtype)
        self.keys = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.output = nn.Linear(hidden, vocabulary, dtype=dtype)

    def forward(
        self,
        memory: Tensor,  # [B, S, H]
        mask: Tensor,  # [B, S], True = attend
        steps: int,
        beams: int,
    ) -> tuple[Tensor, Tensor]:
        """The best hypothesis of each row: tokens [B, L], padded behind EOS, L <= steps; scores [B]."""
        return self.greedy(memory, mask, steps) if beams == 1 else self.beam(memory, mask, steps, beams)

    @abstractmethod
    def read(self, memory: Tensor, mask: Tensor) -> Read:
        """What all steps read."""

    @abstractmethod
    def step(self, tokens: Tensor, state: State, keys: Tensor, memory: Tensor, masked: Tensor) -> tuple[Tensor, State]:
        """tokens [N] -> logits [N, V], and the next state."""

    @abstractmethod
    def start(self, zeros: Tensor) -> State:
        """The first state, of zeros [N, H]."""

    def greedy(self, memory: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The likeliest token after another."""
        read, state = self.read(memory, mask), self.start(memory.new_zeros(len(memory), self.hidden))
        tokens = torch.full((len(memory),), BOS, device=memory.device)
        ended = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
        chosen, gained = [], []
        for _ in range(steps):
            logits, state = self.step(tokens, state, *read)
            gain, tokens = logits.log_softmax(-1).max(-1)
            chosen.append(tokens)
            gained.append(gain)
            ended = ended | (tokens == EOS)
            if ended.all():
                break
        ids = torch.stack(chosen, 1)
        there = _there(ids)
        return ids.masked_fill(~there, PAD), torch.stack(gained, 1).mul(there).sum(1) / there.sum(1)

    def beam(self, memory: Tensor, mask: Tensor, steps: int, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest beginnings go on; a row is done when k hypotheses have ended that none of them beats."""
        batch = len(memory)
        read, state = self.read(memory, mask), self.start(memory.new_zeros(batch * k, self.hidden))
        tokens = torch.full((batch * k,), BOS, device=memory.device)
        ids = torch.full((batch * k, steps), PAD, device=memory.device)
        first = torch.arange(batch, device=memory.device)[:, None] * k
        scores = memory.new_zeros(batch, k)
        scores[:, 1:] = -torch.inf  # all beams are the same so far
        whole = None
        for t in range(steps):
            logits, state = self.step(tokens, state, *read)
            every = logits.log_softmax(-1).view(batch, k, -1).add_(scores[:, :, None])
            scores, index = every.view(batch, -1).topk(2 * k, 1)  # of a beam one continuation ends: k go on
            rows, token = first + index // self.vocabulary, index % self.vocabulary
            ends = token == EOS
            if ends.any():
                whole = whole or Whole(memory, ids, k)
                grown = ids[rows[:, :k]]
                grown[:, :, t] = EOS
                whole.add((scores[:, :k] / (t + 1)).masked_fill(~ends[:, :k], -torch.inf), grown)
                scores, going = scores.masked_fill(ends, -torch.inf).topk(k, 1)
                rows, token = rows.gather(1, going), token.gather(1, going)
            scores, rows, tokens = scores[:, :k], rows[:, :k].flatten(), token[:, :k].flatten()
            if whole is not None and whole.all_done(scores[:, 0] / (t + 1)):
                break
            ids = ids.index_select(0, rows)
            ids[:, t] = tokens
            state = [s.index_select(0, rows) for s in state]
        if whole is None:
            return ids.view(batch, k, -1)[:, 0], scores[:, 0] / steps
        whole.add(scores / steps, ids.view(batch, k, -1))
        return whole.best()

    def _next(self, x: Tensor, state: State) -> State:
        """The cell's h, and of an LSTM c."""
        return list(self.cell(x, (state[0], state[1]))) if self.lstm else [self.cell(x, state[0])]

    def _context(self, scores: Tensor, memory: Tensor, masked: Tensor) -> Tensor:
        """[B, k, S] -> [N, H]."""
        weights = scores.masked_fill(masked, torch.finfo(scores.dtype).min).softmax(-1)
        return torch.bmm(weights, memory).view(-1, self.hidden)


class BahdanauSearch(SearchLoop):
    """c of additive attention by h; h = cell([embedding of the last token, c], h), which the logits are made of."""

    def __init__(self, cell: str, hidden: int, vocabulary: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(cell, hidden, vocabulary, dtype)
        self.query = nn.Linear(hidden, hidden, bias=False, dtype=dtype)
        self.energy = nn.Linear(hidden, 1, bias=False, dtype=dtype)

    def read(self, memory: Tensor, mask: Tensor) -> Read:
        return self.keys(memory)[:, None], memory, ~mask[:, None]

    def start(self, zeros: Tensor) -> State:
        return [zeros] * (2 if self.lstm else 1)

    def step(self, tokens: Tensor, state: State, keys: Tensor, memory: Tensor, masked: Tensor) -> tuple[Tensor, State]:
        asked = self.query(state[0]).view(len(memory), -1, 1, self.hidden)
        scores = self.energy((keys + asked).tanh_()).squeeze(-1)
        context = self._context(scores, memory, masked)
        state = self._next(torch.cat([self.embedding(tokens), context], -1), state)
        return self.output(state[0]), state


class LuongSearch(SearchLoop):
    """h = cell([embedding of the last token, a], h); c of general attention by h; a = tanh(W [c, h]), for logits."""

    def __init__(self, cell: str, hidden: int, vocabulary: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(cell, hidden, vocabulary, dtype)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False, dtype=dtype)

    def read(self, memory: Tensor, mask: Tensor) -> Read:
        return self.keys(memory).mT, memory, ~mask[:, None]

    def start(self, zeros: Tensor) -> State:
        return [zeros] * (3 if self.lstm else 2)

    def step(self, tokens: Tensor, state: State, keys: Tensor, memory: Tensor, masked: Tensor) -> tuple[Tensor, State]:
        state = self._next(torch.cat([self.embedding(tokens), state[-1]], -1), state)
        h = state[0]
        context = self._context(torch.bmm(h.view(len(memory), -1, self.hidden), keys), memory, masked)
        a = self.combine(torch.cat([context, h], -1)).tanh_()
        return self.output(a), [*state, a]


class Whole:
    """The k best finished hypotheses of each row."""

    def __init__(self, memory: Tensor, ids: Tensor, k: int) -> None:
        batch = len(memory)
        self.scores = memory.new_full((batch, k), -torch.inf)
        self.ids = ids.new_full((batch, k, ids.shape[1]), PAD)
        self.done = torch.zeros(batch, dtype=torch.bool, device=ids.device)

    def add(self, scores: Tensor, ids: Tensor) -> None:
        """scores [B, n], -inf for none, of ids [B, n, T]; rows that are done take no more."""
        scores = scores.masked_fill(self.done[:, None], -torch.inf)
        self.scores, kept = torch.cat([self.scores, scores], 1).topk(self.scores.shape[1], 1)
        self.ids = torch.cat([self.ids, ids], 1).take_along_dim(kept[:, :, None], 1)

    def all_done(self, reached: Tensor) -> Tensor:
        """Whether in all rows k are no worse than what the best beam has reached [B]."""
        self.done = self.done | (self.scores[:, -1] >= reached)
        return self.done.all()

    def best(self) -> tuple[Tensor, Tensor]:
        """Tokens [B, L], scores [B]."""
        ids = self.ids[:, 0]
        return ids[:, : int(_there(ids).sum(1).max())], self.scores[:, 0]


def _there(ids: Tensor) -> Tensor:
    """[B, T]: True up to a row's first EOS and at it."""
    ends = ids == EOS
    return ends.cumsum(1) - ends.long() == 0
