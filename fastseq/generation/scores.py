"""What is done to the scores of the next token, and how a whole hypothesis is ranked."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .options import Options

__all__ = ["LogitsProcessor", "coverage", "is_repeat", "processed", "warped"]

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # (ids [N, L], scores [N, V]) -> scores [N, V], as transformers'


def processed(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, L], from bos on
    new: int,  # tokens that were generated before this one
    options: Options,
    processors: Sequence[LogitsProcessor],
) -> Tensor:
    """Log-probabilities [N, V] in fp32 (fp64 of fp64), -inf for what may not come next; NaN where a logit is."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    dead = logits.amax(-1, keepdim=True) == -torch.inf  # nothing may come: log_softmax would say NaN
    scores = torch.where(dead, -torch.inf, torch.log_softmax(logits, -1))
    for processor in processors:
        found = processor(ids, scores)
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"logits_processor returned {kind}; expected scores {tuple(scores.shape)}")
        scores = found
    if new < options.min_new_tokens:
        scores = scores.clone()
        scores[:, options.eos_id] = -torch.inf
    if options.no_repeat_ngram_size:
        scores = scores.masked_fill(is_repeat(ids, scores.shape[1], options.no_repeat_ngram_size), -torch.inf)
    return scores


def is_repeat(ids: Tensor, vocab_size: int, n: int) -> Tensor:
    """[N, V]: whether a token would end an n-gram that its row [L] already has (Paulus et al. 2018, 2.5)."""
    banned = ids.new_zeros((ids.shape[0], vocab_size), dtype=torch.uint8)  # CUDA has no amax of bool
    if ids.shape[1] < n:
        return banned.bool()
    grams = ids.unfold(1, n, 1)  # [N, L - n + 1, n]
    same = (grams[:, :, :-1] == ids[:, None, ids.shape[1] - n + 1 :]).all(-1)
    return banned.scatter_reduce(1, grams[:, :, -1], same.to(torch.uint8), "amax").bool()


def warped(scores: Tensor, options: Options) -> Tensor:
    """Scores to draw from: over the temperature, then the k likeliest and what ties with the last of them, then the
    fewest likeliest of probability p (Holtzman et al. 2020, 3.1), of which the likeliest always stays.
    """
    scores = (scores - scores.amax(-1, keepdim=True)) / options.temperature
    if options.top_k:
        least = scores.topk(min(options.top_k, scores.shape[1]), -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= options.top_p  # what stands before it has p already
        scores = scores.masked_fill(torch.empty_like(drop).scatter_(1, index, drop), -torch.inf)
    return scores


def coverage(total: Tensor, there: Tensor, beta: float) -> Tensor:
    """beta sum_s log(min(a_s, 1)) of the weights a that each position got in all [..., S] (Wu et al. 2016, eq. 14).

    there [..., S]: positions of the source; one that got none counts as if it had the least number above 0.
    """
    got = total.clamp(min=torch.finfo(total.dtype).tiny, max=1)
    return beta * torch.where(there, got.log(), 0).sum(-1)
