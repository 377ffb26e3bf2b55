"""Reports made of numbers that are known, for the tests of what is told of them."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks import ceilings, results, runner
from benchmarks.cases import Case, LayerCase
from benchmarks.decoder_cases import AttentionCase, CorpusCase, DecoderCase
from benchmarks.generate_cases import GenerateCase

LAYER = LayerCase("lstm", "train", 50, 8, 64, 64)
DECODER = DecoderCase("bahdanau", "gru", "forward", 20, 20, 1, 256)
WHERE = {"cpu": "some CPU", "isa": "avx2", "torch": "2.13", "onnxruntime": "1.32", "date": "2026-01-02T03:04"}
TOPS = [
    ceilings.Ceiling("float32", 1, 1e11, "the register tile"), ceilings.Ceiling("call", 1, 1e-6, "zero_"),
    ceilings.Ceiling("load", 1, 2e12, "loads", size=32768), ceilings.Ceiling("load", 1, 5e11, "loads", size=1 << 62),
]  # fmt: skip


def row_of(
    of: str,
    case: Case,
    rounds: Mapping[str, Sequence[float]],  # seconds, or bytes, by contender; ours are "auto" and "cpu"
    threads: int = 1,
    measure: str = "time",
    calm: float = 1.0,
) -> results.Row:
    """A row of these rounds, as the runner makes it: `auto` and `cpu` against all others."""
    values = {name: list(seconds) for name, seconds in rounds.items()}
    ours = [name for name in ("auto", "cpu", "frozen") if name in values]
    pairs = tuple((mine, peer) for mine in ours for peer in values if peer not in ours)
    timings = {n: runner.summarize(v, "cpu" if n in ours else n, first=0.5) for n, v in values.items()}
    return results.Row(of, case, threads, measure, timings, runner._ratios(case, pairs, values), calm)


def noisy(rng: random.Random, median: float, rounds: int = 31, spread: float = 0.03) -> list[float]:
    """Rounds around a median, a few of them much slower."""
    return [median * math.exp(rng.gauss(0, spread)) * (1 + (rng.random() < 0.05) * rng.random()) for _ in range(rounds)]


def everything() -> results.Report:
    """Rows of every kind, growth, a training, memory, and what was left out; in no doubt."""
    rng = random.Random(1)

    def row(of: str, case: Case, ratio: float, peer: str, measure: str = "time", threads: int = 1) -> results.Row:
        base = case.flops / 5e10 + 1e-5 if measure != "memory" else 1e6
        ours = noisy(rng, base / threads)
        return row_of(of, case, {"auto": ours, "cpu": ours, peer: noisy(rng, base * ratio / threads)}, threads, measure)

    layers = [replace(LAYER, op=op, B=b, I=h, H=h) for op in ("lstm", "gru") for b in (1, 8) for h in (64, 256)]
    rows = [row("grid", case, 0.9 + case.B / 8, "torch.nn") for case in layers]
    rows += [row("memory", case, 1.5, "torch.nn", "memory", 2) for case in layers[:4]]
    rows += [row("cold", LAYER, 1.1, "torch.nn", "cold")]
    for h, s in ((256, 20), (512, 30)):
        rows.append(row("decoder", replace(DECODER, H=h, S=s, T=s), 4.0, "loop"))
        rows.append(row("generate", GenerateCase("luong", "lstm", 5, s, 30, 1, h, 1000), 3.0, "loop"))
        rows.append(row("attention", AttentionCase("dot", "train", s, s, 8, h), 1.5, "plain"))
    rows.append(row("corpus", CorpusCase("luong", "lstm", "train", "multi30k", 64), 1.6, "loop"))
    rows += [row("growth-T", replace(LAYER, T=t), 2.0, "torch.nn") for t in (1, 10, 100)]
    rows += [row("growth-threads", LAYER, 2.0, "torch.nn", threads=n) for n in (1, 2, 4)]
    rows.append(row("self", LAYER, 1.0, "auto.again"))
    trainings = [
        results.Recipe("g2p", 0, 1, "error rate", 0.2, [_learner("fastseq", 2.0), _learner("torch", 1.0)], 1e-6, 1e-4)
    ]
    import_s = runner.summarize([0.2, 0.21], "import")
    return results.Report(WHERE, TOPS, {"torch.compile": "not named"}, rows, import_s, trainings)


def _learner(library: str, speed: float) -> results.Learner:
    losses = [3 * math.exp(-step / 300) for step in range(1000)]
    quality = [[step / speed, float(step), 0.9 * math.exp(-step / 400)] for step in range(250, 1001, 250)]
    return results.Learner(library, 100 * speed, 600 / speed, 600, losses, quality)
