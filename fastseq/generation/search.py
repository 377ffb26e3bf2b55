"""The searches: one row after another's likeliest token or draw, and beams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError
from .options import Options
from .scores import LogitsProcessor, coverage, length_norm, processed, warped

__all__ = ["GenerateOutput", "Model", "Reorder", "Step", "Stream", "beam_search", "follow", "picked", "repeated"]

Step = Callable[[Tensor, Any], Any]  # (tokens [N], state) -> (logits [N, V], state) or (logits, state, weights [N, S])
Reorder = Callable[[Any, Tensor], Any]  # (state, index [N]) -> the state of these rows
Stream = Callable[[Tensor], None]  # of the tokens [N] of a step


class GenerateOutput(NamedTuple):
    """Hypotheses, the best first: B rows with R of them each."""

    sequences: Tensor  # [B, R, L] int64: without bos, with eos, then pad_id
    lengths: Tensor  # [B, R]: tokens before the padding
    scores: Tensor  # [B, R]: the new tokens' log-probability over their length norm, plus the coverage penalty
    weights: Tensor | None  # [B, R, L, S]: a token's attention, 0 behind the length


@dataclass
class Model:
    """The step and its state: N rows in, checked scores and weights out."""

    step: Step
    state: Any
    options: Options
    processors: Sequence[LogitsProcessor]
    reorder: Reorder
    largest: int  # of the forced tokens

    def __post_init__(self) -> None:
        self.vocab_size = 0  # until the first step
        self.needs_weights = self.options.return_weights or self.options.coverage_penalty > 0

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] and weights [N, S], the latter where they are asked for."""
        got = self.step(tokens, self.state)
        if not isinstance(got, tuple) or len(got) not in (2, 3):
            raise TypeError(f"step must return (logits, state) or (logits, state, weights), got {_kind(got)}")
        logits, self.state, weights = got if len(got) == 3 else (*got, None)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != tokens.shape[0]:
            raise InputError(f"step returned logits {_kind(logits)}; expected a tensor [N={tokens.shape[0]}, V]")
        if not self.vocab_size:
            self.options.check_vocabulary(logits.shape[1])
            if self.largest >= logits.shape[1]:
                raise InputError(
                    f"decoder_input_ids holds {self.largest}, but step gives logits of {logits.shape[1]} tokens"
                )
            self.vocab_size = logits.shape[1]
        elif logits.shape[1] != self.vocab_size:
            raise InputError(f"step returned logits of {logits.shape[1]} tokens, of {self.vocab_size} before")
        if not self.needs_weights:
            return logits, None
        if weights is None:
            raise InputError("return_weights and coverage_penalty need a step that returns (logits, state, weights)")
        if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.shape[0] != tokens.shape[0]:
            raise InputError(f"step returned weights {_kind(weights)}; expected a tensor [N={tokens.shape[0]}, S]")
        return logits, weights.float()

    def read(self, prefix: Tensor) -> list[Tensor]:
        """Every forced token [N, P] but the last, one step each: their weights."""
        found = []
        for tokens in prefix[:, :-1].unbind(1):
            weights = self.advance(tokens)[1]
            if weights is not None:
                found.append(weights)
        return found

    def scores(self, logits: Tensor, ids: Tensor, new: int) -> Tensor:
        return processed(logits, ids, new, self.options, self.processors)

    def pick(self, rows: Tensor) -> None:
        """Goes on with these rows of the state."""
        self.state = self.reorder(self.state, rows)


def follow(model: Model, prefix: Tensor, stream: Stream | None, generator: torch.Generator | None) -> GenerateOutput:
    """Greedy search, or with do_sample one draw a step; rows do not touch each other. prefix: [N, P] from bos on."""
    options, rows, past = model.options, prefix.shape[0], prefix.shape[1]
    ids = _with_room(prefix, options)
    seen = model.read(prefix)
    tokens, total = prefix[:, -1], torch.zeros((), device=prefix.device)
    lengths = prefix.new_full((rows,), past)
    running = torch.ones(rows, dtype=torch.bool, device=prefix.device)
    covered: Tensor | None = sum(seen) if seen else None  # type: ignore[assignment]  # of tensors
    for new in range(options.max_new_tokens):
        logits, weights = model.advance(tokens)
        scores = model.scores(logits, ids[:, : past + new], new)
        if options.do_sample:
            tokens = torch.multinomial(warped(scores, options).softmax(-1), 1, generator=generator)[:, 0]
        else:
            tokens = scores.argmax(-1)
        total = total + torch.where(running, scores.gather(1, tokens[:, None])[:, 0], 0)
        if weights is not None:
            weights = weights * running[:, None]
            covered = weights if covered is None else covered + weights
            seen.append(weights)
        tokens = torch.where(running, tokens, options.pad_id)
        ids[:, past + new] = tokens
        lengths += running
        running = running & (tokens != options.eos_id)
        if stream is not None:
            stream(tokens)
        if not bool(running.any()):
            break
    norms = torch.tensor([length_norm(n, options) for n in range(1, options.max_new_tokens + 1)], dtype=total.dtype)
    total = total / norms.to(total.device)[lengths - past - 1]
    if covered is not None and options.coverage_penalty:
        total = total + coverage(covered, options.coverage_penalty)
    shape = (options.batch_size, options.copies)
    found = GenerateOutput(
        ids[:, 1:].unflatten(0, shape), (lengths - 1).view(shape), total.view(shape),
        torch.stack(seen, 1).unflatten(0, shape) if options.return_weights else None,
    )  # fmt: skip
    return _ranked(found, options)


@dataclass
class Hypotheses:
    """k for each of B rows: whole ones, or those that go on."""

    scores: Tensor  # [B, k], of whole ones the final score; -inf: there is none
    ids: Tensor  # [B, k, P + max_new]
    lengths: Tensor  # [B, k]
    weights: Tensor | None  # [B, k, P + max_new - 1, S]

    def chosen(self, index: Tensor) -> "Hypotheses":
        """Those at index [B, k'] of the k."""
        return Hypotheses(
            self.scores.gather(1, index), _take(self.ids, index), self.lengths.gather(1, index),
            None if self.weights is None else _take(self.weights, index),
        )  # fmt: skip


def beam_search(model: Model, prefix: Tensor) -> GenerateOutput:
    """The num_beams likeliest beginnings go on at every step (Graves 2012; Sutskever et al. 2014, 3.2).

    Of the 2 k likeliest continuations of a row, those of the first k that end are finished hypotheses, and the k
    likeliest that do not end go on. A row is done when `early_stopping` says so. prefix: [N, P] from bos on.
    """
    options, past = model.options, prefix.shape[1]
    batch, k = options.batch_size, options.num_beams
    seen = model.read(prefix)
    ids = _with_room(prefix, options).view(batch, k, -1)
    scores = torch.zeros(batch, k, device=prefix.device)
    scores[:, 1:] = -torch.inf  # all beams are the same so far
    beams = Hypotheses(scores, ids, torch.full_like(ids[:, :, 0], past), None)
    whole = Hypotheses(torch.full_like(scores, -torch.inf), ids, beams.lengths, None)
    done = torch.zeros(batch, dtype=torch.bool, device=prefix.device)
    covered: Tensor | None = sum(seen) if seen else None  # type: ignore[assignment]  # of tensors
    first_row = torch.arange(batch, device=prefix.device)[:, None] * k
    tokens = prefix[:, -1]
    for new in range(options.max_new_tokens):
        at = past + new
        logits, weights = model.advance(tokens)
        steps = model.scores(logits, beams.ids[:, :, :at].flatten(0, 1), new)
        if weights is not None:
            covered = weights if covered is None else covered + weights
            _keep_weights(beams, whole, seen, weights, at - 1, options)
        if new == 0:
            beams.scores = beams.scores.to(steps.dtype)
            whole.scores = whole.scores.to(steps.dtype)
        every = (beams.scores[:, :, None] + steps.view(batch, k, -1)).flatten(1)
        best, index = every.topk(min(2 * k, every.shape[1]), 1)
        parent, token = index // model.vocab_size, index % model.vocab_size
        ends = token == options.eos_id
        longer = Hypotheses(best, beams.ids, beams.lengths + 1, beams.weights)
        final = _final(best, new + 1, None if covered is None else covered[first_row + parent], options)
        ranks = torch.arange(best.shape[1], device=best.device)
        final = final.masked_fill(~ends | (ranks >= k) | done[:, None], -torch.inf)
        whole = _merged(whole, _continued(longer, parent, token, final, at), k)
        going = best.masked_fill(ends, -torch.inf)
        best, rank = going.topk(k, 1)
        parent, token = parent.gather(1, rank), token.gather(1, rank)
        beams = _continued(longer, parent, token, best, at)
        done = done | _is_done(whole, beams, new + 1, options)
        if bool(done.all()):
            break
        rows = (first_row + parent).flatten()
        model.pick(rows)
        tokens = token.flatten()
        covered = None if covered is None else covered[rows]
    final = _final(beams.scores, new + 1, None if covered is None else covered.unflatten(0, (batch, k)), options)
    beams.scores = final.masked_fill(done[:, None], -torch.inf)
    whole = _merged(whole, beams, options.num_return_sequences)
    return _trimmed(GenerateOutput(whole.ids[:, :, 1:], whole.lengths - 1, whole.scores, whole.weights), options)


def _with_room(prefix: Tensor, options: Options) -> Tensor:
    """[N, P + max_new_tokens]: the prefix, then padding."""
    return torch.nn.functional.pad(prefix, (0, options.max_new_tokens), value=options.pad_id)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, k, ...] at index [B, k']."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _keep_weights(
    beams: Hypotheses, whole: Hypotheses, seen: list[Tensor], weights: Tensor, at: int, options: Options
) -> None:
    """The weights [N, S] of a step, at its token's place in every beam; the first time those of the prefix too."""
    if not options.return_weights:
        return
    batch, k, length = beams.ids.shape
    if beams.weights is None:
        beams.weights = weights.new_zeros(batch, k, length - 1, weights.shape[1])
        whole.weights = beams.weights.clone()
        for place, past in enumerate(seen):
            beams.weights[:, :, place] = past.view(batch, k, -1)
    beams.weights[:, :, at] = weights.view(batch, k, -1)


def _final(scores: Tensor, length: int, covered: Tensor | None, options: Options) -> Tensor:
    """Of whole hypotheses [B, k'] with these log-probabilities and sums of weights [B, k', S]."""
    final = scores / length_norm(length, options)
    if covered is None or not options.coverage_penalty:
        return final
    return final + coverage(covered, options.coverage_penalty)


def _continued(of: Hypotheses, parent: Tensor, token: Tensor, scores: Tensor, at: int) -> Hypotheses:
    """The hypotheses at `parent` [B, k'], each with its token at place `at`."""
    found = of.chosen(parent)
    found.scores = scores
    found.ids[:, :, at] = token
    return found


def _merged(a: Hypotheses, b: Hypotheses, k: int) -> Hypotheses:
    """The k best of both, the best first."""
    weights = None if a.weights is None or b.weights is None else torch.cat((a.weights, b.weights), 1)
    both = Hypotheses(
        torch.cat((a.scores, b.scores), 1), torch.cat((a.ids, b.ids), 1), torch.cat((a.lengths, b.lengths), 1), weights
    )
    return both.chosen(both.scores.topk(k, 1).indices)


def _is_done(whole: Hypotheses, beams: Hypotheses, length: int, options: Options) -> Tensor:
    """[B]: nothing can go on, or k hypotheses are whole and, but for early_stopping=True, no beam would beat them.

    What a beam may still reach: its score so far over the norm of its length; with "never", of the longest, where that
    is more. Neither counts a coverage penalty, which is never above 0.
    """
    full = whole.scores[:, -1] > -torch.inf
    if options.early_stopping is not True:
        longest = options.early_stopping == "never" and options.length_penalty > 0
        norm = length_norm(options.max_new_tokens if longest else length, options)
        full = full & (whole.scores[:, -1] >= beams.scores[:, 0] / norm)
    return full | (beams.scores[:, 0] == -torch.inf)


def _ranked(found: GenerateOutput, options: Options) -> GenerateOutput:
    order = found.scores.argsort(dim=1, descending=True, stable=True)
    sequences, lengths, scores = (
        _take(found.sequences, order),
        found.lengths.gather(1, order),
        found.scores.gather(1, order),
    )
    weights = None if found.weights is None else _take(found.weights, order)
    return _trimmed(GenerateOutput(sequences, lengths, scores, weights), options)


def _trimmed(found: GenerateOutput, options: Options) -> GenerateOutput:
    """Of the longest one's length; behind each one's own, padding and weights of 0."""
    lengths = torch.where(found.scores > -torch.inf, found.lengths, 0)  # fewer hypotheses than asked for: empty ones
    longest = int(lengths.max())
    there = torch.arange(longest, device=lengths.device) < lengths[:, :, None]
    sequences = torch.where(there, found.sequences[:, :, :longest], options.pad_id)
    weights = None if found.weights is None else found.weights[:, :, :longest] * there[..., None]
    return GenerateOutput(sequences, lengths, found.scores, weights)


def picked(state: Any, index: Tensor) -> Any:
    """Rows `index` of every tensor of a pytree."""
    return pytree.tree_map_only(Tensor, lambda t: t.index_select(0, index), state)


def repeated(state: Any, copies: int) -> Any:
    """Every row of every tensor of a pytree `copies` times."""
    return pytree.tree_map_only(Tensor, lambda t: t.repeat_interleave(copies, 0), state)


def _kind(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
