"""Searches that a backend runs whole, tokens chosen inside its loop over steps; the same answers as `search`'s."""

import torch

from ..backends.decoder_call import DecoderCall
from ..decoding import refuses_search, run_search
from ..ops.decoder_search import Search, Vocabulary
from .request import Request
from .search import GenerateOutput, assembled, refuse_nan

__all__ = ["refuses", "refuses_native", "run_native", "unfit"]


def refuses(request: Request) -> str | None:
    """What of this request needs a step at a time; None if nothing does."""
    options = request.options
    asked = {
        "do_sample": options.do_sample, "logits_processor": request.processors, "streamer": request.streamer,
        "coverage_penalty": options.coverage_penalty, "no_repeat_ngram_size": options.no_repeat_ngram_size,
    }  # fmt: skip
    return next((f"{name} looks at every step" for name, value in asked.items() if value), None)


def refuses_native(call: DecoderCall, of: Vocabulary, backend: str) -> str | None:
    """Why the steps of this call and the choice of their tokens are no search of a backend; None if they are."""
    return unfit(call, of) or refuses_search(call, backend)


def unfit(call: DecoderCall, of: Vocabulary) -> str | None:
    """Why, whatever the backend, the steps of this call are no search of its; what is no matter of a kind of call."""
    if torch.compiler.is_compiling():
        return "torch.compile records single steps"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode gradients"
    if any(t is not None and (t.dtype, t.device) != (call.y.dtype, call.y.device) for t in of):
        return "embedding and output have several dtypes or devices"
    return None


def run_native(call: DecoderCall, of: Vocabulary, request: Request, backend: str) -> GenerateOutput | None:
    """What is found from a call of one step, of N rows; None where the call's backend has no search for it."""
    if unfit(call, of) is not None:
        return None
    options = request.options
    lengths = range(options.max_new_tokens + 1)
    found = run_search(
        call,
        Vocabulary(*(None if t is None else t.contiguous() for t in of)),  # type: ignore[arg-type]
        Search(
            request.prefix.contiguous(), [options.norm(max(n, 1)) for n in lengths], options.copies,
            options.num_return_sequences, options.min_new_tokens, options.eos_id, options.pad_id,
            options.early_stopping, options.length_penalty > 0, options.return_weights,
        ),
        backend,
    )  # fmt: skip
    if found is None:
        return None
    if found.wrong:
        refuse_nan()
    if found.weights is None:
        longest = int(found.lengths.max())
        return GenerateOutput(found.tokens[:, :, :longest], found.lengths, found.scores, None)
    rows = torch.arange(options.batch_size, device=found.trail.device)[:, None, None] * options.copies
    return assembled(
        options, found.scores, found.tokens, found.lengths, rows + found.trail, found.weights.float().transpose(0, 1)
    )
