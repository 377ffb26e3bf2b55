"""The rows of `gpu-bench`, most important first: what fastseq promises on a GPU, and what stands beside it."""

from dataclasses import replace
from itertools import product

from ..cases import Case, LayerCase
from ..decoder_cases import WIDTHS, AttentionCase, CorpusCase, DecoderCase
from ..generate_cases import GenerateCase
from ..option_cases import OPTIONS, OptionCase
from ..registry import MODES, OPS, Entry, Pairs
from ..shapes import deepbench, flashrnn

__all__ = ["AIMS", "GPU_SETS", "IN_ORDER", "MEAN_AIMS", "OURS_AIMS", "STEP_AIMS", "rehearsed"]

OURS = ("auto", "triton", "cuda")
MEAN_AIMS = {
    ("gpu-calls", "forward"): 1.3,
    ("gpu-calls", "train"): 1.3,
    ("gpu-recurrence", "forward"): 3.0,
    ("gpu-recurrence", "train"): 2.5,
}  # of the geometric mean
AIMS = {  # by set, mode and peer: least ratio of every row
    ("gpu-decoder", "train", "loop"): 8.0,
    ("gpu-decoder", "train", "loop.graph"): 2.0,
    ("gpu-attention bfloat16", "forward", "plain"): 4.0,
    ("gpu-attention bfloat16", "train", "plain"): 3.5,
    ("gpu-attention float32", "forward", "plain"): 2.5,
    ("gpu-attention float32", "train", "plain"): 2.0,
    ("gpu-small", "forward", "torch.nn"): 1.0,
    ("gpu-small", "train", "torch.nn"): 1.0,
    ("gpu-calls", "forward", "torch.nn"): 0.98,
    ("gpu-calls", "train", "torch.nn"): 0.98,
    ("gpu-varlen", "forward", "torch.nn"): 5.0,
    ("gpu-varlen", "train", "torch.nn"): 5.0,
    ("gpu-generate greedy", "forward", "loop"): 8.0,
    ("gpu-recurrence", "forward", "torch.nn"): 1.2,
    ("gpu-recurrence", "train", "torch.nn"): 1.2,
    ("gpu-corpus", "train", "loop"): 5.0,
    ("gpu-options layer_norm", "forward", "triton.plain"): 0.5,
    ("gpu-options layer_norm", "train", "triton.plain"): 0.5,
    ("gpu-options", "forward", "triton.plain"): 0.8,
    ("gpu-options", "train", "triton.plain"): 0.8,
    ("gpu-options", "forward", "cuda.plain"): 0.8,
    ("gpu-options", "train", "cuda.plain"): 0.8,
}
OURS_AIMS = {  # of one of ours: in the place of what the set has for all of them
    ("gpu-decoder", "train", "cuda", "loop"): 15.0,
    ("gpu-decoder", "train", "cuda", "loop.graph"): 4.0,
    **{("gpu-varlen", mode, "cuda", "torch.nn"): 10.0 for mode in MODES},
    **{("gpu-recurrence bidirectional", mode, "cuda", "torch.nn"): 3.0 for mode in MODES},
    **{("gpu-recurrence layers", mode, "cuda", "torch.nn"): 2.0 for mode in MODES},
    **{
        (name, mode, "auto", "torch.nn"): 0.98
        for name, mode in product(("gpu-large", "gpu-deepbench", "gpu-flashrnn"), MODES)
    },
}
STEP_AIMS = {256: 0.8, 512: 1.3, 768: 1.9, 1024: 2.4}  # by H: us a step forward of `gpu-recurrence`, bf16; backward 2 x
HALF_FIRST = ("bfloat16", "float32")


def _against(*peers: str) -> Pairs:
    return tuple(product(OURS, peers))


def _entries(name: str, cases: list[Case], *peers: str) -> tuple[Entry, ...]:
    return tuple(Entry(name, replace(case, device="cuda"), _against(*peers), (1,)) for case in cases)  # type: ignore[type-var]


def _decoder() -> list[Case]:
    """The row that matters most is the first: Bahdanau's decoder, training, bf16."""
    order = product(HALF_FIRST, WIDTHS, ("train", "forward"))
    return [DecoderCase(a, "lstm", mode, 64, 64, 64, 512, dtype) for dtype, a, mode in order]


def _attention() -> list[Case]:
    return [AttentionCase("additive", mode, 64, 64, 64, 512, dtype) for dtype, mode in product(HALF_FIRST, MODES)]


def _small() -> list[Case]:
    """Layers whose weights fit one program."""
    sizes = (("bfloat16", 128), ("bfloat16", 64), ("float32", 64))
    return [
        LayerCase(op, mode, 128, b, h, h, dtype=dtype)
        for (dtype, h), op, mode, b in product(sizes, OPS, MODES, (64, 8))
    ]


def _calls() -> list[Case]:
    """One step with a state."""
    order = product((64, 8, 1), (512, 256, 64), MODES, OPS, ("_cell", ""))
    return [LayerCase(op + end, mode, 1, b, h, h, hx=True) for b, h, mode, op, end in order]


def _varlen() -> list[Case]:
    order = product((256, 512, 64), OPS, MODES)
    return [LayerCase(op, mode, 128, 64, h, h, dtype="bfloat16", rows="lengths") for h, op, mode in order]


def _generate() -> list[Case]:
    """At shapes whose tokens no rounding changes (docs/benchmark.md)."""
    order = product(((32, 30), (1, 20)), (1, 5), WIDTHS)
    return [GenerateCase(a, "lstm", beams, s, 30, b, 256, 1000) for (b, s), beams, a in order]


def _corpus() -> list[Case]:
    return [CorpusCase(a, "lstm", "train", "multi30k", 512, dtype="bfloat16") for a in WIDTHS]


def _recurrence() -> list[Case]:
    """Where synchronisation is the limit: few rows, many steps, sizes for a cluster and for a grid of blocks."""
    order = product(("bfloat16", "float32"), (512, 1024, 256, 768), OPS, MODES)
    cases: list[Case] = [LayerCase(op, mode, 1024, 16, h, h, dtype=dtype) for dtype, h, op, mode in order]
    wide = product((512, 256), MODES)
    cases += [LayerCase("lstm", mode, 512, 32, h, h, bidirectional=True, dtype="bfloat16") for h, mode in wide]
    cases += [
        LayerCase("lstm", mode, 512, 32, 512, 512, layers, dtype="bfloat16") for layers, mode in product((2, 4), MODES)
    ]
    return cases + [LayerCase("lstm", mode, 1024, 16, h, h, dtype="float16") for h, mode in product((512, 768), MODES)]


def _large() -> list[Case]:
    """Where the vendor is expected to win: what `auto` must leave to it."""
    order = product((256, 512, 1024), OPS, MODES)
    return [LayerCase(op, mode, 128, 64, h, h, dtype="bfloat16") for h, op, mode in order]


def _loops() -> list[Case]:
    """What is gained over a loop of cells, eager and as one graph."""
    return [LayerCase(op, mode, 50, b, 256, 256) for b, op, mode in product((32, 1), OPS, MODES)]


def _options() -> tuple[Entry, ...]:
    """Each option over the same layer without it; of layer normalisation, the costly one, every dtype and cell."""
    order = product(HALF_FIRST, (512, 128), OPS, MODES)
    normed = [OptionCase(op, m, 128, 64, h, h, dtype=dtype, option="layer_norm") for dtype, h, op, m in order]
    options = [option for option in OPTIONS if option not in ("", "layer_norm")]
    others = [
        OptionCase("lstm", m, 128, 64, 512, 512, dtype="bfloat16", option=o) for o, m in product(options, MODES[::-1])
    ]
    cases = [(case, ("auto", "triton")) for case in normed]
    cases[2:2] = [(case, ("triton", "cuda")) for case in others]  # the CUDA kernels have no layer normalisation
    return tuple(
        Entry("gpu-options", replace(case, device="cuda"), tuple((on, f"{on}.plain") for on in ours), (1,))
        for case, ours in cases
    )


GPU_SETS: dict[str, tuple[Entry, ...]] = {
    "gpu-decoder": _entries("gpu-decoder", _decoder(), "loop", "loop.graph"),
    "gpu-attention": _entries("gpu-attention", _attention(), "plain"),
    "gpu-small": _entries("gpu-small", _small(), "torch.nn"),
    "gpu-calls": _entries("gpu-calls", _calls(), "torch.nn"),
    "gpu-varlen": _entries("gpu-varlen", _varlen(), "torch.nn"),
    "gpu-generate": _entries("gpu-generate", _generate(), "loop"),
    "gpu-recurrence": _entries("gpu-recurrence", _recurrence(), "torch.nn"),
    "gpu-corpus": _entries("gpu-corpus", _corpus(), "loop"),
    "gpu-options": _options(),
    "gpu-large": _entries("gpu-large", _large(), "torch.nn"),
    "gpu-loops": _entries("gpu-loops", _loops(), "cells", "cells.graph"),
    "gpu-deepbench": _entries("gpu-deepbench", [*deepbench()], "torch.nn"),
    "gpu-flashrnn": _entries(
        "gpu-flashrnn", [*flashrnn()], "torch.nn", "flashrnn", "flashrnn.alternating", "flashrnn.triton"
    ),
    "gpu-compiled": (
        *_entries("gpu-compiled", _attention()[:2], "plain.compile"),
        *_entries("gpu-compiled", _decoder()[1:2], "loop.compile"),
        *_entries("gpu-compiled", _decoder()[:1], "loop.compile"),
    ),
}
# A row of each kind stands before the long tails, so that a stage cut short has seen everything once. Sets that are not
# here take longer than the stage has.
HEADS = {"gpu-decoder": 8, "gpu-attention": 4, "gpu-small": 8, "gpu-calls": 12, "gpu-varlen": 4, "gpu-generate": 3,
         "gpu-recurrence": 8, "gpu-corpus": 2, "gpu-options": 4, "gpu-loops": 2, "gpu-large": 0,
         "gpu-compiled": 1}  # fmt: skip
IN_ORDER: tuple[Entry, ...] = (
    *(entry for name, head in HEADS.items() for entry in GPU_SETS[name][:head]),
    *(entry for name, head in HEADS.items() for entry in GPU_SETS[name][head:]),
)


def rehearsed(entry: Entry) -> Entry:
    """The same row, of few numbers, on the CPU: the first way through without a GPU."""
    pairs = tuple((ours, peer) for ours, peer in entry.pairs if not peer.endswith(".graph") and ours == "auto")
    return replace(entry, case=replace(entry.case.small(), device="cpu"), pairs=pairs)  # type: ignore[type-var]
