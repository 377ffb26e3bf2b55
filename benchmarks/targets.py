"""What the project promises: of groups of rows the mean and minimum of the ratios; of decoders and searches each."""

from typing import NamedTuple

from .cases import LayerCase
from .decoder_cases import AttentionCase, DecoderCase
from .generate_cases import GenerateCase
from .option_cases import OPTIONS, OptionCase
from .peers import PEERS
from .registry import DECODER_SHAPES, NEW_TOKENS, SEARCH_SHAPES
from .results import Ratio, Row

__all__ = ["IMPORT_S", "MODES", "TARGETS", "Target", "group", "promised"]

IMPORT_S = 0.3
MODES = {"forward": "forward", "train": "training"}


class Target(NamedTuple):
    """Least mean and least minimum; None: not promised."""

    mean: float | None
    least: float | None = None


def group(row: Row, ratio: Ratio) -> str:
    """The group's name, a key of TARGETS where something is promised."""
    peer, mode = PEERS[ratio.peer].label, MODES[row.case.mode]
    if row.set == "grid" and isinstance(row.case, LayerCase):
        return f"{row.case.cell.upper()} {mode} over {peer}"
    if row.set == "loops" or row.set.startswith("deepbench"):
        assert isinstance(row.case, LayerCase)
        head = "DeepBench " if row.set != "loops" else ""
        return f"{head}{row.case.cell.upper().replace('_', ' ')} {mode} over {peer}"
    if isinstance(row.case, OptionCase):
        option = row.case.option.replace("_", " ")
        return f"{option}{f' {mode}' if ratio.peer == 'cells' else ''} over {peer}"
    if row.set == "frozen" and isinstance(row.case, LayerCase):
        return f"frozen {row.case.cell.upper()}{' cell' if row.case.is_cell else ''} over {peer}"
    if row.set == "bf16" and ratio.peer == "torch.nn" and isinstance(row.case, LayerCase):
        return f"bf16 {row.case.cell.upper()} {mode} over {peer}"
    if row.set == "varlen":
        return f"variable length over {peer}{' x real/padded' if ratio.peer.endswith('.full') else ''}"
    if row.set == "memory":
        return f"peak memory of {'' if row.case.kind == 'layers' else 'decoder '}training, {peer}'s over ours"
    if row.set == "threads":
        return f"two threads over {peer}"
    if isinstance(row.case, AttentionCase):
        return f"{row.case.score} attention {mode} over {peer}"
    return f"{row.set} {mode} over {peer}"


def promised(row: Row, ratio: Ratio) -> float | None:
    """The least ratio, where one is promised of this very row."""
    targets: tuple[float, ...] | None
    shapes: tuple[tuple[int, int, int], ...]
    case = row.case
    if ratio.peer != "loop" or row.threads != 1:
        return None
    if row.set == "decoder" and isinstance(case, DecoderCase):
        targets = DECODER_TARGETS.get((case.attention, case.mode))
        shapes, shape = DECODER_SHAPES, (case.B, case.H, case.T)
    elif isinstance(case, GenerateCase) and (case.T, case.V) == (NEW_TOKENS, SEARCH_VOCABULARY):
        targets, shapes, shape = SEARCH_TARGETS.get(case.beams), SEARCH_SHAPES, (case.B, case.H, case.S)
    else:
        return None
    return None if targets is None else dict(zip(shapes, targets, strict=True)).get(shape)


TARGETS = {
    "LSTM forward over torch.nn": Target(1.4, 0.97),
    "LSTM forward over ONNX Runtime": Target(1.1, 0.95),
    "LSTM training over torch.nn": Target(1.3, 0.97),
    "GRU forward over torch.nn": Target(2.0, 0.97),
    "GRU forward over ONNX Runtime": Target(1.1, 0.95),
    "GRU training over torch.nn": Target(2.5, 1.1),
    "frozen LSTM over ONNX Runtime": Target(1.1, 0.95),
    "frozen GRU over ONNX Runtime": Target(1.1, 0.95),
    "bf16 forward over our fp32": Target(1.6, 1.3),
    "bf16 training over our fp32": Target(1.6, 1.3),
    "variable length over our full length x real/padded": Target(1 / 1.1),
    "calls forward over torch.nn": Target(1.3, 0.97),
    "calls training over torch.nn": Target(1.3, 0.97),
    **{f"{o.replace('_', ' ')} over our plain layer": Target(None, 1 / 1.15) for o in OPTIONS if o},
    "layer norm over our plain layer": Target(None, 1 / 1.5),
    "two threads over our one thread": Target(None, 1.6),
    "peak memory of training, torch.nn's over ours": Target(None, 1.0),
    "peak memory of decoder training, torch loop's over ours": Target(None, 2.0),
}
DECODER_TARGETS = {  # over the loop, on one thread, at each of DECODER_SHAPES; LSTM and GRU alike
    ("bahdanau", "forward"): (5.0, 3.0, 2.2, 1.8),
    ("bahdanau", "train"): (6.0, 2.5, 2.0, 1.55),
    ("luong", "train"): (6.0, 2.5, 2.0, 1.55),
}
SEARCH_VOCABULARY = 1000  # no promise says of how many tokens: it is held to this
SEARCH_TARGETS = {  # by beams; over the loop, on one thread, at each of SEARCH_SHAPES; all decoders alike
    1: (6.0, 3.0, 2.0),
    5: (4.0, 2.5, 2.0),
}
