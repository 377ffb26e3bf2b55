"""What is done to the scores of the next token, and how a whole hypothesis is ranked."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .options import Options

__all__ = ["LogitsProcessor", "coverage", "is_repeat", "length_norm", "processed", "warped"]

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # (ids [N, L], scores [N, V]) -> scores [N, V], as transformers'


def processed(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, L], from bos on
    new: int,  # tokens that were generated before this one
    options: Options,
    processors: Sequence[LogitsProcessor],
) -> Tensor:
    """Log-probabilities [N, V] in fp32 (fp64 of fp64), -inf for what may not come next."""
    scores = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    for processor in processors:
        scores = processor(ids, scores)
    if new < options.min_new_tokens:
        scores = scores.index_fill(-1, torch.tensor([options.eos_id], device=scores.device), -torch.inf)
    if options.no_repeat_ngram_size:
        scores = scores.masked_fill(is_repeat(ids, scores.shape[1], options.no_repeat_ngram_size), -torch.inf)
    return scores


def is_repeat(ids: Tensor, vocab_size: int, n: int) -> Tensor:
    """[N, V]: whether a token would end an n-gram that its row [L] already has (Paulus et al. 2018, 2.5)."""
    banned = ids.new_zeros((ids.shape[0], vocab_size), dtype=torch.bool)
    if ids.shape[1] < n:
        return banned
    grams = ids.unfold(1, n, 1)  # [N, L - n + 1, n]
    same = (grams[:, :, :-1] == ids[:, None, ids.shape[1] - n + 1 :]).all(-1)
    return banned.scatter_reduce(1, grams[:, :, -1], same, "amax")


def warped(scores: Tensor, options: Options) -> Tensor:
    """Scores to draw from: over the temperature, then the k likeliest, then the fewest likeliest of probability p
    (Holtzman et al. 2020, 3.1), of which the likeliest always stays.
    """
    scores = scores / options.temperature
    if options.top_k:
        least = scores.topk(options.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p < 1:
        ordered, index = scores.sort(-1, descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= options.top_p  # what stands before it has p already
        scores = scores.masked_fill(torch.empty_like(drop).scatter_(1, index, drop), -torch.inf)
    return scores


def length_norm(length: int, options: Options) -> float:
    """What the log-probability of so many tokens is divided by: length^alpha, or Wu et al. 2016, eq. 14's
    ((5 + length) / 6)^alpha; alpha is the length_penalty.
    """
    base = length if options.length_norm == "len" else (5 + length) / 6
    return float(base**options.length_penalty)


def coverage(total: Tensor, beta: float) -> Tensor:
    """beta sum_s log(min(a_s, 1)) of the weights that each position got in all [..., S] (Wu et al. 2016, eq. 14).

    A position that never got any is not one of the source: softmax gives none a weight of 0 but those masked out.
    """
    return beta * torch.where(total > 0, total.clamp(max=1).log(), 0).sum(-1)
