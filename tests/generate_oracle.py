"""A small model to search with, and the searches written out."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastseq

__all__ = ["BOS", "EOS", "PAD", "Toy", "all_sequences", "final", "plain_beam", "tokens_of"]

BOS, EOS, PAD = 0, 1, 2
H = 6


@dataclass
class Toy:
    """A recurrent model in float64 that also attends; the memory of row b of the batch is its own."""

    V: int = 5
    B: int = 3
    S: int = 4
    seed: int = 0
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.embedding, self.u, self.w = normal(self.V, H), normal(H, H) * 0.7, normal(H, self.V) * self.sharpness
        self.memory, self.h0 = normal(self.B, self.S, H), normal(self.B, H)
        self.mask = torch.ones(self.B, self.S, dtype=torch.bool)
        self.mask[1:2, -1] = False  # of the second row one position less

    def state(self) -> dict[str, Tensor]:
        return {"h": self.h0.clone()}

    def step(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        copies = len(tokens) // self.B
        h = torch.tanh(self.embedding[tokens] + state["h"] @ self.u)
        scores = (h.view(self.B, copies, 1, H) * self.memory[:, None]).sum(-1)
        weights = scores.masked_fill(~self.mask[:, None], -math.inf).softmax(-1).flatten(0, 1)
        return (h + weights @ torch.ones(self.S, H, dtype=h.dtype)) @ self.w, {"h": h}, weights

    def row(self, b: int) -> "Toy":
        """Row b alone."""
        one = Toy(self.V, 1, self.S, self.seed, self.sharpness)
        one.embedding, one.u, one.w = self.embedding, self.u, self.w
        one.memory, one.h0, one.mask = self.memory[b : b + 1], self.h0[b : b + 1], self.mask[b : b + 1]
        return one

    def score(self, tokens: list[int], prefix: tuple[int, ...] = (BOS,)) -> tuple[float, Tensor]:
        """Log-probability of the tokens after the prefix, of a Toy with one row; all weights [P - 1 + L, S]."""
        state, total, weights = self.state(), 0.0, []
        fed = [*prefix, *tokens]
        for k, (token, following) in enumerate(itertools.pairwise(fed)):
            logits, state, w = self.step(torch.tensor([token]), state)
            weights.append(w[0])
            if k + 1 >= len(prefix):
                total += float(logits.log_softmax(-1)[0, following])
        return total, torch.stack(weights)

    def run(self, **options: Any) -> fastseq.GenerateOutput:
        given = {"batch_size": self.B, "bos_id": BOS, "eos_id": EOS, "pad_id": PAD, "max_new_tokens": 6} | options
        return fastseq.generate(self.step, self.state(), **given)


def norm(length: int, options: dict[str, Any]) -> float:
    base = length if options.get("length_norm", "len") == "len" else (5 + length) / 6
    return float(base ** options.get("length_penalty", 1.0))


def final(toy: Toy, tokens: list[int], options: dict[str, Any], prefix: tuple[int, ...] = (BOS,)) -> float:
    """The score of a whole hypothesis, by its definition."""
    total, weights = toy.score(tokens, prefix)
    penalty = options.get("coverage_penalty", 0.0) * float(weights.sum(0)[toy.mask[0]].clamp(max=1).log().sum())
    return total / norm(len(tokens), options) + penalty


def tokens_of(found: fastseq.GenerateOutput, b: int, r: int = 0) -> list[int]:
    return found.sequences[b, r, : int(found.lengths[b, r])].tolist()


def all_sequences(V: int, most: int) -> list[list[int]]:
    """Every sequence that ends by eos, or for its length."""
    every = [[*t] for length in range(1, most + 1) for t in itertools.product(range(V), repeat=length)]
    return [t for t in every if EOS not in t[:-1] and (t[-1] == EOS or len(t) == most)]


def plain_beam(
    toy: Toy, k: int, most: int, options: dict[str, Any], prefix: tuple[int, ...] = (BOS,)
) -> list[tuple[float, list[int]]]:
    """One sentence's beam search, a list of hypotheses at a time: k best, the best first."""
    stops = options.get("early_stopping", False)
    beams, whole = [(0.0, [])], []  # type: ignore[var-annotated]
    for length in range(1, most + 1):
        every = []
        for total, tokens in beams:
            state = toy.state()
            for token in [*prefix, *tokens]:
                logits, state, _ = toy.step(torch.tensor([token]), state)
            every += [(total + float(p), [*tokens, v]) for v, p in enumerate(logits.log_softmax(-1)[0])]
        every.sort(key=lambda x: -x[0])
        whole += [(final(toy, t, options, prefix), t) for _, t in every[:k] if t[-1] == EOS]
        whole = sorted(whole, key=lambda x: -x[0])[:k]
        beams = [x for x in every[: 2 * k] if x[1][-1] != EOS][:k]
        longest = stops == "never" and options.get("length_penalty", 1.0) > 0
        reach = beams[0][0] / norm(most if longest else length, options)
        if len(whole) == k and (stops is True or whole[-1][0] >= reach):
            return whole
    whole += [(final(toy, t, options, prefix), t) for _, t in beams]
    return sorted(whole, key=lambda x: -x[0])[:k]
