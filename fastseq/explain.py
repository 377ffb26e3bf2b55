"""Why a call runs on the backend it runs on."""

import inspect
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import decoding, engine
from .backends.call import RnnCall
from .backends.decoder_call import AttentionCall, DecoderCall
from .backends.fused import without_frozen
from .checks import check_call, check_cell
from .dispatch import BACKENDS, Call, candidates, check_name, load, obstacle, use_backend
from .generation.native import unfit
from .modules.dropin import CELLS, DROP_INS, LAYERS, call_of, not_reached
from .modules.seq2seq import Seq2Seq
from .ops.decoder_search import Vocabulary

__all__ = ["Explanation", "Verdict", "explain"]


class Verdict(NamedTuple):
    """What one backend makes of a call."""

    backend: str
    chosen: bool
    reason: str


class Explanation(tuple[Verdict, ...]):
    """One verdict for each backend; str() is a table."""

    @property
    def chosen(self) -> str | None:
        """The backend that runs the call; None where the one asked for cannot."""
        return next((v.backend for v in self if v.chosen), None)

    def __str__(self) -> str:
        return "\n".join(f"{'→' if v.chosen else ' '} {v.backend:<10} {v.reason}" for v in self)

    __repr__ = __str__


def explain(target: Any, input: Any = None, hx: Any = None, *, lengths: Any = None, resets: Any = None) -> Explanation:
    """For each backend: chosen, or the reason why not, were `target(input, hx, lengths=lengths)` called here and now.

    target: a fastseq LSTM, GRU, RNN or cell of these, one of torch.nn as `accelerate` would run it, a subclass as
    `patch` would, a module that itself makes its call, by as_call(input, hx) and, where that takes them, lengths=
    (Encoder, whose first layer is looked at: x and lengths; Seq2Seq: src, tgt_in and lengths, its src_lengths; Decoder:
    y and memory; Attention: query and keys), or a call, such as decoder.as_call(y, keys, state). resets go to layers as
    lengths do. No backend is chosen where the one asked for cannot run the call, which then raises, or where a forward
    of the module's own reaches none. Of a frozen module it says whether the call uses the packed weights, of a Seq2Seq
    how the CUDA kernels would run a greedy search of as many tokens as each row of the target has. Raises what the call
    itself would raise for a wrong input.

    >>> print(fastseq.explain(torch.nn.LSTM(4, 8), torch.zeros(3, 2, 4)))
    """
    named = engine.prefer(check_name(getattr(target, "backend", "auto")))
    model, as_call = target, getattr(target, "as_call", None)
    if as_call is not None:
        target = _made(target, as_call, input, hx, lengths, resets)
    if isinstance(target, (DecoderCall, AttentionCall)):
        search = None
        if isinstance(model, Seq2Seq) and isinstance(target, DecoderCall):
            search = _search_of(model, target)
        return _verdicts(decoding.as_asked(target), named, search=search)
    if isinstance(target, RnnCall):
        call, cell = target, target.input.dim() == 2 and target.batch_sizes is None
    else:
        call, cell = _call(target, input, hx, lengths, resets)
        if (why := not_reached(target)) is not None:
            return Explanation(Verdict(name, False, f"not reached: {why}") for name in BACKENDS)
    asked, _ = engine.as_asked(call, check_cell if cell else check_call)
    return _verdicts(asked, named, _of_frozen(call, asked))


def _made(module: Any, as_call: Any, input: Any, hx: Any, lengths: Any, resets: Any) -> Call:
    """What the module's as_call makes of the arguments."""
    kind, takes = type(module).__name__, inspect.signature(as_call).parameters
    if input is None:
        raise TypeError(
            f"explain of a module of the kind {kind} needs {next(iter(takes), 'input')}, its first argument"
        )
    if resets is not None or (lengths is not None and "lengths" not in takes):
        raise TypeError(f"{kind} takes no {'resets' if lengths is None else 'lengths'}")
    given = [input] if hx is None and lengths is not None else [input, hx]
    with use_backend("auto"):  # a Seq2Seq's encoder runs, on whatever can, before its decoder is looked at
        made: Call = as_call(*given) if lengths is None else as_call(*given, lengths=lengths)
    return made


def _search_of(model: Seq2Seq, call: DecoderCall) -> Vocabulary | str:
    """What a search from this call makes tokens of, or why `generate` steps from Python instead."""
    vocabulary = model.vocabulary
    if vocabulary is None:
        return str(model.stepwise_part)
    reason = unfit(call, vocabulary)
    if reason is None and decoding.as_asked(call) is not call:
        reason = "autocast"
    return reason or vocabulary


def _call(module: nn.Module, input: Any, hx: Any, lengths: Any, resets: Any) -> tuple[RnnCall, bool]:
    """The module's call as `engine` would have it, and whether it is a cell's."""
    if input is None and isinstance(module, tuple(DROP_INS)):
        raise TypeError(f"explain of a module of the kind {type(module).__name__} needs input, its first argument")
    if isinstance(module, tuple(CELLS)):
        if lengths is not None or resets is not None:
            raise TypeError(f"a cell takes no {'resets' if lengths is None else 'lengths'}")
        call = call_of(module, input, hx)
        if call.input.dim() == 1:
            engine.set_batched_cell(call)
        return call, True
    if not isinstance(module, tuple(LAYERS)):
        ours = ", ".join(stock.__name__ for stock in DROP_INS)
        raise TypeError(f"explain takes an {ours}, Encoder, Attention, Decoder or Seq2Seq, got {type(module).__name__}")
    call = call_of(module, input, hx)
    if isinstance(input, PackedSequence):
        engine.set_packed(call, input, lengths, resets)
    elif input.dim() == 2:
        engine.set_batched(call, lengths, resets)
    else:
        call.resets = resets
        if lengths is not None:
            engine.set_lengths(call, lengths)
    return call, False


def _of_frozen(call: RnnCall, asked: RnnCall) -> str:
    """What the CPU kernels make of the packed weights that `fastseq.freeze` lets a module keep."""
    if call.frozen is None:
        return ""
    reason = without_frozen(asked) if asked.frozen is not None else "autocast casts the weights in each call"
    if reason is not None:
        return f"; without its frozen weights: {reason}"
    per = len(call.weights) // call.num_layers
    parts = [call.weights[k : k + per] for k in range(0, len(call.weights), per)]
    current = all(layer.is_current(part) for layer, part in zip(call.frozen, parts, strict=True))
    return "; with frozen weights" + ("" if current else ", packing them first")


def _verdicts(call: Call, named: str, of_cpu: str = "", search: Vocabulary | str | None = None) -> Explanation:
    """`named` is a backend, or "auto"; of_cpu: what to add where the CPU kernels run.

    search: what a search makes tokens of, or why it steps from Python; None: there is none.
    """
    obstacles = {name: obstacle(name, call) for name in BACKENDS}
    chosen, why = named, "named by backend= or use_backend"
    if named == "auto":
        chosen, why = next((name, why) for name, why in candidates(call) if obstacles[name] is None)
    verdicts = []
    for name, reason in obstacles.items():
        if name == chosen and reason is None:
            runs = f"runs this call: {why}{_layout(name, call, search)}{of_cpu if name == 'cpu' else ''}"
            verdicts.append(Verdict(name, True, runs))
        elif name == chosen:
            verdicts.append(Verdict(name, False, f"cannot run this call, which raises InputError: {reason}; {why}"))
        else:
            behind = "could" if obstacles[chosen] is not None else f"could; {chosen} goes first: {why}"
            verdicts.append(Verdict(name, False, reason or behind))
    return Explanation(verdicts)


def _layout(name: str, call: Call, search: Vocabulary | str | None) -> str:
    """How the backend's kernels would share out the work, of those that plan it."""
    backend: Any = load(name, call.OPERATOR)
    told = [str(plan) for plan in backend.layout(call)] if hasattr(backend, "layout") else []
    if search is not None and hasattr(backend, "greedy"):
        way = f"step by step: {search}" if isinstance(search, str) else backend.greedy(call, search)
        told.append(f"greedy search {way}")
    return "".join(f"; {part}" for part in told)
