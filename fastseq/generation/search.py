"""The searches: one row after another's likeliest token or draw, and beams."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, with_article
from .options import Options
from .request import Request, Stream
from .scores import coverage, processed, warped

__all__ = ["GenerateOutput", "Reorder", "Step", "assembled", "refuse_nan", "run_search"]

Step = Callable[[Tensor, Any], Any]  # (tokens [N], state) -> (logits [N, V], state) or (logits, state, weights [N, S])
Reorder = Callable[[Any, Tensor], Any]  # (state, index [N]) -> the state of these rows


class GenerateOutput(NamedTuple):
    """Hypotheses, the best first: B rows with R of them each. Where there are fewer: of length 0, with score -inf.

    sequences: [B, R, L] int64, without bos, with forced tokens and eos, then pad_id. lengths: [B, R], tokens before the
    padding, forced ones and eos counted. scores: [B, R], the new tokens' log-probability divided by its length norm
    (greedy ones and draws too), plus the coverage penalty. weights: [B, R, L, S], each token's attention, 0 behind the
    length; None unless asked for.
    """

    sequences: Tensor  # [B, R, L] int64: without bos, with eos, then pad_id
    lengths: Tensor  # [B, R]: tokens before the padding
    scores: Tensor  # [B, R]: the new tokens' log-probability over their length norm, plus the coverage penalty
    weights: Tensor | None  # [B, R, L, S]: a token's attention, 0 behind the length


@dataclass
class Model:
    """The step and its state: N rows in, checked scores and weights out."""

    step: Step
    state: Any
    request: Request
    reorder: Reorder

    def __post_init__(self) -> None:
        self.options = self.request.options
        self.vocab_size = 0  # until the first step
        self.needs_weights = self.options.needs_weights
        self.weights: list[Tensor] = []  # [N, S] of each step, with return_weights
        self.covered: Tensor | None = None  # [N, S], the sum of what each row's steps gave; with coverage_penalty
        self.there: Tensor | None = None  # [B, 1, S]: positions that some step of the row gave any

    def advance(self, tokens: Tensor, running: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the next step; its weights are kept, those of rows [N] that do not run as 0."""
        got = self.step(tokens, self.state)
        if not isinstance(got, tuple) or len(got) not in (2, 3):
            raise TypeError(f"step must return (logits, state) or (logits, state, weights), got {_kind(got)}")
        logits, self.state, weights = got if len(got) == 3 else (*got, None)
        self._check_logits(logits, tokens)
        if self.needs_weights:
            self._keep(weights, tokens, running)
        return logits

    def _check_logits(self, logits: Any, tokens: Tensor) -> None:
        rows = tokens.shape[0]
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != rows:
            raise InputError(f"step returned logits {_kind(logits)}; expected a tensor [N={rows}, V]")
        if logits.device != tokens.device:
            raise InputError(f"step returned logits on {logits.device}, tokens are on {tokens.device}; pass device=")
        if logits.shape[1] == self.vocab_size:
            return
        if self.vocab_size:
            raise InputError(f"step returned logits of {logits.shape[1]} tokens, of {self.vocab_size} before")
        self.request.check_vocabulary(logits.shape[1])
        self.vocab_size = logits.shape[1]

    def _keep(self, weights: Any, tokens: Tensor, running: Tensor | None) -> None:
        if weights is None:
            raise InputError("return_weights and coverage_penalty need a step that returns (logits, state, weights)")
        rows, before = tokens.shape[0], self.covered if self.covered is not None else next(iter(self.weights), None)
        if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.shape[0] != rows:
            raise InputError(f"step returned weights {_kind(weights)}; expected a tensor [N={rows}, S]")
        if before is not None and before.shape != weights.shape:
            raise InputError(f"step returned weights {_kind(weights)}, of shape {tuple(before.shape)} before")
        kept = weights.detach().to(torch.float32, copy=True)  # the step may use its buffer again
        if running is not None:
            kept = torch.where(running[:, None], kept, 0)
        if self.options.return_weights:
            self.weights.append(kept)
        if self.options.coverage_penalty:
            there = (kept > 0).view(self.options.batch_size, -1, kept.shape[1]).any(1, keepdim=True)
            self.there = there if self.there is None else self.there | there
            self.covered = kept if self.covered is None else self.covered + kept

    def scores(self, logits: Tensor, ids: Tensor, new: int, running: Tensor) -> tuple[Tensor, Tensor]:
        """Of the next token [N, V]; whether a row [N] that runs has NaN, of which none are left."""
        scores = processed(logits, ids, new, self.options, self.request.processors)
        wrong = scores.isnan()
        return scores.masked_fill(wrong, -torch.inf), (wrong.any(-1) & running).any()

    def final(self, scores: Tensor, norms: Tensor | float, parent: Tensor | None = None) -> Tensor:
        """Of whole hypotheses [B, k'] with these log-probabilities; parent [B, k']: each one's row among its B's."""
        final = scores / norms
        if self.covered is None or self.there is None:
            return final
        covered = self.covered.unflatten(0, (self.options.batch_size, -1))
        covered = covered if parent is None else _take(covered, parent)
        return final + coverage(covered, self.there, self.options.coverage_penalty)

    def pick(self, rows: Tensor) -> None:
        """Goes on with these rows [N]."""
        self.state = self.reorder(self.state, rows)
        self.covered = None if self.covered is None else self.covered.index_select(0, rows)


def run_search(step: Step, state: Any, request: Request, reorder: Reorder | None = None) -> GenerateOutput:
    """What `generate` finds, all checked."""
    if reorder is None:
        state = repeated(state, request.options.batch_size, request.options.copies)
    model, rows = Model(step, state, request, reorder or picked), request.rows
    if request.options.num_beams > 1:
        return beam_search(model, rows)
    if not hasattr(request.streamer, "put"):
        return follow(model, rows, request.stream, request.generator)
    request.streamer.put(rows.cpu())
    found = follow(model, rows, request.stream, request.generator)
    request.streamer.end()
    return found


def follow(model: Model, prefix: Tensor, stream: Stream | None, generator: torch.Generator | None) -> GenerateOutput:
    """Greedy search, or with do_sample one draw a step; rows do not touch each other. prefix: [N, P] from bos on.

    A row with nothing that may come next ends there, without eos.
    """
    options, past = model.options, prefix.shape[1]
    ids = _with_room(prefix, options)
    tokens = _read(model, prefix)
    lengths = torch.zeros_like(tokens)
    running, total = torch.ones_like(tokens, dtype=torch.bool), torch.zeros((), device=prefix.device)
    for new in range(options.max_new_tokens):
        logits = model.advance(tokens, running)
        scores, wrong = model.scores(logits, ids[:, : past + new], new, running)
        running = running & (scores.amax(-1) > -torch.inf)
        scores = torch.where(running[:, None], scores, 0)  # a row that ended takes any token
        if options.do_sample:
            tokens = torch.multinomial(warped(scores, options).softmax(-1), 1, generator=generator)[:, 0]
        else:
            tokens = scores.argmax(-1)
        total = total + scores.gather(1, tokens[:, None])[:, 0]
        tokens = torch.where(running, tokens, options.pad_id)
        ids[:, past + new] = tokens
        lengths = lengths + running
        running = running & (tokens != options.eos_id)
        if stream is not None:
            stream(tokens)
        if _stops(~running.any(), wrong):
            break
    norms = torch.tensor([options.norm(max(n, 1)) for n in range(options.max_new_tokens + 1)], dtype=total.dtype)
    shape = (options.batch_size, options.copies)
    total = model.final(total.view(shape), norms.to(total.device)[lengths].view(shape))
    return _ranked(model, total, ids[:, 1:].unflatten(0, shape), (lengths + past - 1).view(shape))


@dataclass
class Hypotheses:
    """k for each of B rows: whole ones, or those that go on."""

    scores: Tensor  # [B, k], of whole ones the final score; -inf: there is none
    ids: Tensor  # [B, k, P + max_new]
    lengths: Tensor  # [B, k]
    trail: Tensor  # [B, k, P + max_new]: the row of the step that chose each token

    def chosen(self, index: Tensor) -> "Hypotheses":
        """Those at index [B, k'] of the k."""
        return Hypotheses(
            self.scores.gather(1, index), _take(self.ids, index), self.lengths.gather(1, index),
            _take(self.trail, index),
        )  # fmt: skip

    def continued(self, parent: Tensor, token: Tensor, scores: Tensor, at: int) -> "Hypotheses":
        """The hypotheses at `parent` [B, k'], each with its token at place `at`."""
        found = self.chosen(parent)
        found.scores, found.lengths = scores, found.lengths + 1
        found.ids[:, :, at], found.trail[:, :, at] = token, parent
        return found

    def with_others(self, others: "Hypotheses", k: int) -> "Hypotheses":
        """The k best of both, the best first."""
        both = Hypotheses(
            *(torch.cat((getattr(self, name), getattr(others, name)), 1) for name in self.__dataclass_fields__)
        )
        return both.chosen(both.scores.topk(k, 1).indices)


def beam_search(model: Model, prefix: Tensor) -> GenerateOutput:
    """The num_beams likeliest beginnings go on at every step (Graves 2012; Sutskever et al. 2014, 3.2).

    Of the 2 k likeliest continuations of a row, those of the first k that end are finished hypotheses, and the k
    likeliest that do not end go on. A row is done when `early_stopping` says so. prefix: [N, P] from bos on.
    """
    options, past = model.options, prefix.shape[1]
    batch, k = options.batch_size, options.num_beams
    ids = _with_room(prefix, options).view(batch, k, -1)
    tokens = _read(model, prefix)
    scores = torch.zeros(batch, k, device=prefix.device)
    scores[:, 1:] = -torch.inf  # all beams are the same so far
    beams = Hypotheses(scores, ids, torch.full_like(ids[:, :, 0], past - 1), torch.zeros_like(ids))
    whole = Hypotheses(torch.full_like(scores, -torch.inf), ids, beams.lengths, beams.trail)
    done = torch.zeros(batch, dtype=torch.bool, device=prefix.device)
    first_row = torch.arange(batch, device=prefix.device)[:, None] * k
    for new in range(options.max_new_tokens):
        at = past + new
        running = (beams.scores > -torch.inf) & ~done[:, None]
        logits = model.advance(tokens)
        steps, wrong = model.scores(logits, beams.ids[:, :, :at].flatten(0, 1), new, running.flatten())
        every = (beams.scores[:, :, None] + steps.view(batch, k, -1)).flatten(1)
        best, index = every.topk(min(2 * k, every.shape[1]), 1)
        parent, token = index // model.vocab_size, index % model.vocab_size
        ends = token == options.eos_id
        counts = ends & (torch.arange(best.shape[1], device=best.device) < k) & ~done[:, None]
        final = model.final(best, options.norm(new + 1), parent).masked_fill(~counts, -torch.inf)
        whole = whole.with_others(beams.continued(parent, token, final, at), k)
        best, rank = best.masked_fill(ends, -torch.inf).topk(k, 1)
        parent, token = parent.gather(1, rank), token.gather(1, rank)
        beams = beams.continued(parent, token, best, at)
        done = done | _is_done(whole, beams, new + 1, options)
        if _stops(done.all(), wrong) or new + 1 == options.max_new_tokens:
            break
        model.pick((first_row + parent).flatten())
        tokens = token.flatten()
    final = model.final(beams.scores, options.norm(new + 1), parent)
    beams.scores = final.masked_fill(done[:, None], -torch.inf)
    whole = whole.with_others(beams, options.num_return_sequences)
    trail = whole.trail[:, :, 1:] + first_row[:, :, None]
    return _trimmed(model, whole.scores, whole.ids[:, :, 1:], whole.lengths, trail)


def _with_room(prefix: Tensor, options: Options) -> Tensor:
    """[N, P + max_new_tokens]: the prefix, then padding."""
    return torch.nn.functional.pad(prefix, (0, options.max_new_tokens), value=options.pad_id)


def _read(model: Model, prefix: Tensor) -> Tensor:
    """Steps over all forced tokens [N, P] but the last, which is returned."""
    for tokens in prefix[:, :-1].unbind(1):
        model.advance(tokens)
    return prefix[:, -1]


def _stops(done: Tensor, wrong: Tensor) -> bool:
    """The one thing that the host is told of a step."""
    told = int(done + 2 * wrong)
    if told >= 2:
        refuse_nan()
    return told == 1


def refuse_nan() -> NoReturn:
    """What a search does with a row that nothing can be said of."""
    raise InputError("step or a logits_processor returned NaN for a row that had not ended; look at the model")


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, k, ...] at index [B, k']."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _is_done(whole: Hypotheses, beams: Hypotheses, length: int, options: Options) -> Tensor:
    """[B]: nothing can go on, or k hypotheses are whole and, but for early_stopping=True, no beam would beat them.

    What a beam may still reach: its score so far over the norm of its length; with "never", of the longest, where that
    is more. Neither counts a coverage penalty, which is never above 0.
    """
    full = whole.scores[:, -1] > -torch.inf
    if options.early_stopping is not True:
        longest = options.early_stopping == "never" and options.length_penalty > 0
        norm = options.norm(options.max_new_tokens if longest else length)
        full = full & (whole.scores[:, -1] >= beams.scores[:, 0] / norm)
    return full | (beams.scores[:, 0] == -torch.inf)


def _ranked(model: Model, scores: Tensor, ids: Tensor, lengths: Tensor) -> GenerateOutput:
    """Rows that went on by themselves, the best of a B's first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None] * order.shape[1] + order
    trail = rows[:, :, None].expand(-1, -1, ids.shape[2])
    return _trimmed(model, scores.gather(1, order), _take(ids, order), lengths.gather(1, order), trail)


def _trimmed(model: Model, scores: Tensor, ids: Tensor, lengths: Tensor, trail: Tensor) -> GenerateOutput:
    steps = torch.stack(model.weights) if model.options.return_weights else None
    return assembled(model.options, scores, ids, lengths, trail, steps)


def assembled(
    options: Options,
    scores: Tensor,  # [B, R]
    ids: Tensor,  # [B, R, T]
    lengths: Tensor,  # [B, R]
    trail: Tensor,  # [B, R, T]: the row of N whose step chose each token
    steps: Tensor | None,  # [T, N, S], the weights of each step
) -> GenerateOutput:
    """Of the longest one's length; behind each one's own, padding and weights of 0."""
    lengths = torch.where(scores > -torch.inf, lengths, 0)  # fewer hypotheses than asked for: empty ones
    longest = int(lengths.max())
    places = torch.arange(longest, device=lengths.device)
    there = places < lengths[:, :, None]
    sequences = torch.where(there, ids[:, :, :longest], options.pad_id)
    weights = None
    if steps is not None:
        weights = torch.where(there[..., None], steps[places, trail[:, :, :longest]], 0)
    return GenerateOutput(sequences, lengths, scores, weights)


def picked(state: Any, index: Tensor) -> Any:
    """Rows `index` of every tensor of a pytree."""

    def pick(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != len(index):
            raise InputError(f"step returned a state of shape {tuple(t.shape)}; expected N={len(index)} rows at dim 0")
        return t.index_select(0, index)

    return pytree.tree_map_only(Tensor, pick, state)


def repeated(state: Any, rows: int, copies: int) -> Any:
    """Every row of every tensor of a pytree `copies` times; InputError or TypeError for leaves without B rows."""

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or leaf.shape[0] != rows:
                raise InputError(
                    f"state holds a tensor of shape {tuple(leaf.shape)}; expected batch_size={rows} rows at dim 0, or"
                    " pass reorder=, with a state of all rows"
                )
            return leaf.repeat_interleave(copies, 0)
        if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
            raise TypeError(
                f"state holds {with_article(type(leaf).__name__)}, whose rows cannot be picked; pass reorder=, or"
                " tensors in tuples, lists and dicts"
            )
        return leaf

    return pytree.tree_map(repeat, state)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple) else type(value).__name__
