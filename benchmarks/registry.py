"""Every case. A new shape is one entry of a list below or in shapes.py; who is measured is in peers.py."""

from collections.abc import Iterable
from itertools import product

from . import shapes
from .cases import Case, LayerCase
from .decoder_cases import WIDTHS, AttentionCase, CorpusCase, DecoderCase
from .entry import Entry, Pairs
from .estimate import call_seconds
from .generate_cases import GenerateCase
from .growth import GROWTH_SETS
from .heldout import HELDOUT
from .option_cases import LACKS, OPTIONS, OptionCase
from .peers import OURS

__all__ = ["SETS", "Entry", "Pairs"]

OPS, MODES = ("lstm", "gru"), ("forward", "train")
DECODER_SHAPES = ((1, 256, 20), (32, 128, 20), (32, 256, 30), (64, 512, 30))  # B, H, and S = T
SEARCH_SHAPES, BEAMS, NEW_TOKENS = DECODER_SHAPES[:3], (1, 5), 30  # of B, H and S
LONG_S = 0.3  # of a call on a nominal machine: those longer are in no set that `full` has
VOCABULARIES = {1000: OPS, 64: ("lstm",), 8000: ("lstm",)}  # words, whose rows have promises; characters; subwords


def _against(*peers: str) -> Pairs:
    return tuple(product(OURS, peers))


def _own(suffix: str) -> Pairs:
    return tuple((ours, ours + suffix) for ours in OURS)


def _grid(batches: Iterable[int], hidden: Iterable[int]) -> tuple[Entry, ...]:
    return tuple(
        Entry("grid", LayerCase(op, mode, 50, b, h, h), _against("torch.nn", "onnxruntime", "torch.compile"))
        for op, mode, b, h in product(OPS, MODES, batches, hidden)
    )


def _frozen() -> tuple[Entry, ...]:
    """The forward rows of the grid on weights packed once, and single steps of cells."""
    grid = product(OPS, (1, 8, 32, 64), (64, 128, 256, 512))
    cases = [LayerCase(op, "forward", 50, b, h, h) for op, b, h in grid]
    cases += [
        LayerCase(f"{op}_cell", "forward", 1, b, h, h, hx=True) for op, b, h in product(OPS, (1, 8), (64, 256, 512))
    ]
    peers = ("auto", "torch.nn", "onnxruntime")
    return tuple(
        Entry("frozen", case, tuple(product(("frozen",), peers[: 2 if case.is_cell else 3]))) for case in cases
    )


def _bf16() -> tuple[Entry, ...]:
    shapes = product(OPS, MODES, ("bfloat16", "autocast"), (8, 32, 64), (256, 512))
    return tuple(
        Entry("bf16", LayerCase(op, mode, 50, b, h, h, dtype=dtype), _own(".fp32") + _against("torch.nn"))
        for op, mode, dtype, b, h in shapes
    )  # fmt: skip


def _varlen() -> tuple[Entry, ...]:
    return tuple(
        Entry("varlen", LayerCase(op, mode, 50, b, h, h, rows="lengths"), _own(".full") + _against("torch.nn"))
        for op, mode, b, h in product(OPS, MODES, (8, 32, 64), (64, 256))
    )


def _calls() -> tuple[Entry, ...]:
    return tuple(Entry("calls", case, _against("torch.nn")) for case in shapes.calls())


def _rnn() -> tuple[Entry, ...]:
    """Elman's layers and cells."""
    cases = [LayerCase("rnn_tanh", mode, 50, b, h, h) for mode, b, h in product(MODES, (1, 32), (64, 256))]
    cases += [LayerCase("rnn_relu", mode, 50, 32, 256, 256) for mode in MODES]
    cells = [LayerCase("rnn_tanh_cell", mode, 1, 8, 256, 256, hx=True) for mode in MODES]
    return (
        *(Entry("rnn", case, _against("torch.nn", "onnxruntime")) for case in cases),
        *(Entry("rnn", case, _against("torch.nn")) for case in cells),
    )


def _loops() -> tuple[Entry, ...]:
    """What is gained over a loop, on a part of the grid."""
    grid = product(OPS, MODES, (1, 32), (64, 256))
    cases = [LayerCase(op, mode, 50, b, h, h) for op, mode, b, h in grid]
    cases += [LayerCase("lstm", mode, 50, 32, 64, 64, bidirectional=True, rows="lengths") for mode in MODES]
    return tuple(Entry("loops", case, _against("cells", "cells.compile")) for case in cases)


def _options() -> tuple[Entry, ...]:
    """Each option over the same layer without it; layer normalisation also over a loop."""
    kinds = [(op, o) for op, o in product((*OPS, "rnn_tanh"), OPTIONS) if o and o not in LACKS.get(op, ())]
    entries = []
    for (b, h), (op, option), mode in product(((8, 128), (32, 256), (64, 512)), kinds, MODES):
        peers = ("cpu.plain", "cells") if option == "layer_norm" and h < 512 else ("cpu.plain",)
        case = OptionCase(op, mode, 50, b, h, h, option=option)
        entries.append(Entry("options", case, tuple(product(("cpu",), peers)), (1,)))
    return tuple(entries)


def _deepbench(name: str) -> tuple[Entry, ...]:
    """Those of its shapes whose calls are short enough for every run, or the others."""
    cases = [c for c in shapes.deepbench() if (call_seconds(c) < LONG_S) == (name == "deepbench")]
    return tuple(Entry(name, case, _against("torch.nn", "onnxruntime")) for case in cases)


def _threads() -> tuple[Entry, ...]:
    return tuple(
        Entry("threads", LayerCase(op, mode, 50, b, h, h), _own(".1thread"), threads=(2,))
        for op, mode, b, h in product(OPS, MODES, (8, 32, 64), (256, 512))
    )


def _memory() -> tuple[Entry, ...]:
    shapes: list[Case] = [LayerCase(op, "train", 50, b, h, h) for op, b, h in product(OPS, (8, 64), (64, 256, 512))]
    shapes += [LayerCase(op, "train", 50, 32, 256, 256, layers=2, bidirectional=True) for op in OPS]
    shapes += [LayerCase(op, "train", 64, 16, 300, 200, bidirectional=True, rows="packed", hx=True) for op in OPS]
    layers = [Entry("memory", case, _against("torch.nn"), (2,), "memory") for case in shapes]
    decoders = [DecoderCase(attention, cell, "train", 30, 30, 64, 512) for attention, cell in product(WIDTHS, OPS)]
    return (*layers, *(Entry("memory", case, _against("loop"), (2,), "memory") for case in decoders))


def _decoder() -> tuple[Entry, ...]:
    """The promised shapes with full masks, and with sources of different length; one row has but one length."""
    shapes = product(WIDTHS, OPS, MODES, ("full", "lengths"), DECODER_SHAPES)
    cases = [
        DecoderCase(attention, cell, mode, steps, steps, b, h, rows=rows)
        for attention, cell, mode, rows, (b, h, steps) in shapes
        if rows == "full" or b > 1
    ]
    return tuple(Entry("decoder", case, _against("loop", "loop.compile")) for case in cases)


def _corpus() -> tuple[Entry, ...]:
    """A training step for each of some batches of Multi30k."""
    return tuple(
        Entry("corpus", CorpusCase(attention, "lstm", "train", "multi30k", h), _against("loop"))
        for attention, h in product(WIDTHS, (256, 512))
    )


def _attention() -> tuple[Entry, ...]:
    shapes = [(*shape, "full") for shape in DECODER_SHAPES] + [(32, 256, 30, "lengths")]
    return tuple(
        Entry("attention", AttentionCase(score, mode, steps, steps, b, h, rows=rows), _against("plain", "sdpa"))
        for score, mode, (b, h, steps, rows) in product(("additive", "dot"), MODES, shapes)
    )


def _generate() -> tuple[Entry, ...]:
    """The promised shapes, and with fewer and with more tokens to choose from."""
    kinds = [(v, attention, cell) for v, cells in VOCABULARIES.items() for attention, cell in product(WIDTHS, cells)]
    return tuple(
        Entry(
            "generate", GenerateCase(attention, cell, beams, s, NEW_TOKENS, b, h, v), _against("loop", "loop.compile")
        )
        for (v, attention, cell), beams, (b, h, s) in product(kinds, BEAMS, SEARCH_SHAPES)
    )


def _selves() -> tuple[Entry, ...]:
    """Contenders against themselves, in every run: calls from microseconds to tens of milliseconds."""
    layers = [LayerCase("lstm", "forward", 50, 1, 64, 64), LayerCase("gru", "train", 50, 32, 256, 256)]
    pairs = (("auto", "auto.again"), ("torch.nn", "torch.nn.again"))
    decoder = DecoderCase("bahdanau", "lstm", "train", 20, 20, 32, 128)
    return (
        *(Entry("self", case, pairs) for case in layers),
        Entry("self", decoder, (("auto", "auto.again"), ("loop", "loop.again"))),
    )


def _cold() -> tuple[Entry, ...]:
    """Calls as of a program that does much else between two of them."""
    cases: list[Case] = [
        LayerCase(op, "forward", t, 1, h, h, hx=t == 1) for op, t, h in product(OPS, (1, 50), (256, 512))
    ]
    cases += [LayerCase(op, "train", 50, 8, 256, 256) for op in OPS]
    decoders = [
        Entry("cold", DecoderCase(a, "lstm", "forward", 20, 20, 1, 256), _against("loop"), measure="cold")
        for a in WIDTHS
    ]
    return (*(Entry("cold", case, _against("torch.nn"), measure="cold") for case in cases), *decoders)


QUICK = {  # of other sets, parts of names
    "readme": ("T50-B1-I64-", "T50-B1-I256-", "T50-B32-I64-", "T50-B32-I256-"),
    "calls": ("T1-B8-I4-H256-hx", "T64-B1-I1-H64-L2"),
    "varlen": ("T50-B32-I256-",),
    "bf16": ("T50-B32-I256-H256-bfloat16",),
    "decoder": ("lstm-forward-S30-T30-B32-H256", "lstm-train-S30-T30-B32-H256"),
    "attention": ("additive-forward-S30-T30-B32-", "additive-train-S30-T30-B32-"),
    "generate": ("luong-lstm-greedy-S20-T30-B32-H128-V1000", "luong-lstm-beam5-S20-T30-B32-H128-V1000"),
}
SETS: dict[str, tuple[Entry, ...]] = {
    "readme": _grid((1, 8, 32, 64), (64, 128, 256, 512)),
    "rnn": _rnn(),
    "loops": _loops(),
    "frozen": _frozen(),
    "bf16": _bf16(),
    "varlen": _varlen(),
    "calls": _calls(),
    "deepbench": _deepbench("deepbench"),
    "deepbench-large": _deepbench("deepbench-large"),
    "options": _options(),
    "threads": _threads(),
    "memory": _memory(),
    "decoder": _decoder(),
    "corpus": _corpus(),
    "attention": _attention(),
    "generate": _generate(),
    "cold": _cold(),
    "self": _selves(),
    **GROWTH_SETS,
    "heldout": HELDOUT,
    "import": (),  # no call: the runner times a process
    "recipes": (),  # trainings: end_to_end.py
}
SETS["full"] = tuple(entry for name, entries in SETS.items() if not name.endswith("-large") for entry in entries)
SETS["quick"] = tuple(  # every operator, forward and training
    entry for name, parts in QUICK.items() for entry in SETS[name] if any(part in f"{entry.case}" for part in parts)
)
