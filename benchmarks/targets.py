"""What the project promises of each group of rows: geometric mean and minimum of the ratios."""

from typing import NamedTuple

from .registry import PEERS
from .results import Ratio, Row

__all__ = ["IMPORT_S", "TARGETS", "Target", "group"]

IMPORT_S = 0.3
MODES = {"forward": "forward", "train": "training"}


class Target(NamedTuple):
    """Least mean and least minimum; None: not promised."""

    mean: float | None
    least: float | None = None


def group(row: Row, ratio: Ratio) -> str:
    """The group's name, a key of TARGETS where something is promised."""
    peer, mode = PEERS[ratio.peer].label, MODES[row.case.mode]
    if row.set == "grid":
        return f"{row.case.cell.upper()} {mode} over {peer}"
    if row.set == "varlen":
        return f"variable length over {peer}{' x real/padded' if ratio.peer.endswith('.full') else ''}"
    if row.set == "memory":
        return f"peak memory of training, {peer}'s over ours"
    if row.set == "threads":
        return f"two threads over {peer}"
    return f"{row.set} {mode} over {peer}"


TARGETS = {
    "LSTM forward over torch.nn": Target(1.4, 0.97),
    "LSTM forward over ONNX Runtime": Target(1.1, 0.95),
    "LSTM training over torch.nn": Target(1.3, 0.97),
    "GRU forward over torch.nn": Target(2.0, 0.97),
    "GRU forward over ONNX Runtime": Target(1.1, 0.95),
    "GRU training over torch.nn": Target(2.5, 1.1),
    "bf16 forward over our fp32": Target(1.6, 1.3),
    "bf16 training over our fp32": Target(1.6, 1.3),
    "variable length over our full length x real/padded": Target(1 / 1.1),
    "calls forward over torch.nn": Target(1.3, 0.97),
    "calls training over torch.nn": Target(1.3, 0.97),
    "two threads over our one thread": Target(None, 1.6),
    "peak memory of training, torch.nn's over ours": Target(None, 1.0),
}
