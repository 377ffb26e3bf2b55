"""The short tables at the end of `gpu-bench`; of a bench.jsonl: `python -m benchmarks.gpu show FILE`."""

from collections import defaultdict
from collections.abc import Sequence

from .. import corpus
from ..cases import LayerCase
from ..decoder_cases import CorpusCase
from ..generate_cases import GenerateCase
from ..option_cases import OptionCase
from ..peers import PEERS
from ..results import Ratio, Row, Timing
from ..stats import geometric_mean
from ..tables import Table
from .sets import AIMS, MEAN_AIMS, OURS_AIMS, STEP_AIMS

__all__ = ["aim", "epoch_ratio", "rows_table", "sets_table"]

EPOCH = 453  # batches of Multi30k's training pairs, of which a case has some: benchmarks/corpus.py


def rows_table(rows: Sequence[Row]) -> Table:
    """A line for each ratio: what ran, both times, the first call, and the aim."""
    lines = []
    for row in rows:
        for ratio in row.ratios:
            ours, peer = row.timings[ratio.ours], row.timings[ratio.peer]
            if ratio.ours in ("triton", "cuda") and row.timings.get("auto") == ours:
                continue  # one measurement under two names
            epoch = epoch_ratio(row, ratio)
            shown = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            shown += "" if epoch is None else f", epoch with compilation {epoch:.2f}"
            mine = f"{ratio.ours}={ours.backend}", _time(ours), ours.note, f"{ours.first:.1f}"
            lines.append([str(row.case), *mine, ratio.peer, _time(peer), peer.note, shown, aim(row, ratio)])
    ours_head, peer_head = ("ours", "ms [20 %, 80 %]", "note", "first s"), ("peer", "ms [20 %, 80 %]", "note")
    head = ("case", *ours_head, *peer_head, "peer/ours [95 %]", "aim")
    return Table("rows", head, lines)


def sets_table(rows: Sequence[Row]) -> Table:
    """Geometric mean and minimum of each set, mode and peer."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        for ratio in row.ratios:
            groups[_group(row), row.case.mode, ratio.ours, PEERS[ratio.peer].label].append(ratio.median)
    lines = [
        [*key, str(len(v)), f"{geometric_mean(v):.2f}", f"{min(v):.2f}", _mean_aim(key, v)] for key, v in groups.items()
    ]
    return Table("peer's time over ours", ("set", "mode", "ours", "peer", "rows", "mean", "min", "aim"), lines)


def _mean_aim(key: tuple[str, ...], values: Sequence[float]) -> str:
    least = MEAN_AIMS.get((key[0], key[1]))
    return "" if least is None else f"mean {least:g}{' (missed)' if geometric_mean(values) < least else ''}"


def aim(row: Row, ratio: Ratio) -> str:
    """What the project aims at for this row, and whether it is missed."""
    least = _least(row, ratio)
    if least is None or (row.set == "gpu-decoder" and row.case.dtype != "bfloat16"):
        return ""
    reached = epoch_ratio(row, ratio)
    told = f"{least:g}{' (missed)' if (ratio.median if reached is None else reached) < least else ''}"
    return "; ".join(filter(None, (told, _step_aim(row, ratio))))


def _least(row: Row, ratio: Ratio) -> float | None:
    """Of ours, or what it runs on, before that of all; of a part of the set before that of the set."""
    names, mode, ours = (_part(row), row.set), row.case.mode, (ratio.ours, row.timings[ratio.ours].backend)
    keys = [(name, mode, one, ratio.peer) for one in ours for name in names]
    own = [OURS_AIMS[key] for key in keys if key in OURS_AIMS]
    every = [AIMS[of_all] for name in names if (of_all := (name, mode, ratio.peer)) in AIMS]
    return next(iter(own + every), None)


def _step_aim(row: Row, ratio: Ratio) -> str:
    """Of the CUDA kernels' us a step, the products before and after the recurrence included; backward 2 x forward."""
    case, timing = row.case, row.timings[ratio.ours]
    on_cuda = "cuda" in (ratio.ours, timing.backend)  # `auto` may have chosen it, and then stands for both
    plain = _part(row) == "gpu-recurrence" and case.dtype == "bfloat16"
    if not plain or not isinstance(case, LayerCase) or not on_cuda or case.H not in STEP_AIMS:
        return ""
    most, us = STEP_AIMS[case.H] * (3 if case.mode == "train" else 1), timing.median * 1e6 / case.T
    return f"{most:.1f} us a step ({f'missed: {us:.2f}' if us > most else f'{us:.2f}'})"


def epoch_ratio(row: Row, ratio: Ratio) -> float | None:
    """Of a whole epoch's time, first calls and their compilations included; None but of a corpus."""
    if not isinstance(row.case, CorpusCase):
        return None
    ours, peer = (_epoch(row.case, row.timings[name]) for name in (ratio.ours, ratio.peer))
    return peer / ours


def _epoch(case: CorpusCase, timing: Timing) -> float:
    return timing.median * EPOCH / case.count * case.B / corpus.ROWS + max(0.0, timing.first - timing.median)


def _group(row: Row) -> str:
    """What the means are of."""
    if row.set == "gpu-attention":
        return f"{row.set} {row.case.dtype}"
    if row.set == "gpu-generate" and isinstance(row.case, GenerateCase):
        return f"{row.set} {'greedy' if row.case.beams == 1 else 'beams'}"
    return f"{row.set} layer_norm" if _normalises(row) else row.set


def _part(row: Row) -> str:
    """What the aims are of."""
    if row.set != "gpu-recurrence" or not isinstance(row.case, LayerCase):
        return _group(row)
    if row.case.bidirectional:
        return f"{row.set} bidirectional"
    return f"{row.set} layers" if row.case.layers > 1 else row.set


def _normalises(row: Row) -> bool:
    return isinstance(row.case, OptionCase) and row.case.option == "layer_norm" and row.set == "gpu-options"


def _time(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3g} [{timing.q20 * 1e3:.3g}, {timing.q80 * 1e3:.3g}]"
