"""Development BLEU over minutes of training, run by run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..training.command import LOG
from ..training.files import DataError
from .model import PAPERS

STYLES = {"fastseq": "-", "torch": "--"}


def draw(folders: list[Path], path: Path) -> None:
    """One curve per run: a colour for each model, solid for fastseq, dashed for torch.nn."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for folder in folders:
        log = read(folder)
        plan, history = log["plan"], log["history"]
        minutes = [(row["seconds"] - row["evaluating"]) / 60 for row in history]
        axes.plot(
            minutes,
            [row["scores"]["bleu"] for row in history],
            STYLES[plan["library"]],
            color=f"C{PAPERS.index(plan['paper'])}",
            marker=".",
            label=f"{plan['paper']}, {plan['library']}, {log['threads']} thread{'s' * (log['threads'] > 1)}",
        )
    axes.set(
        xlabel="minutes of training, without evaluations",
        ylabel="BLEU on the development set",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def read(folder: Path) -> dict[str, Any]:
    """The log of a run of this recipe; DataError if there is none."""
    path = folder / LOG
    if not path.is_file():
        raise DataError(f"{path}: no log there; name folders that train left")
    try:
        log = json.loads(path.read_bytes())
        if log["plan"]["recipe"] != "translate" or not log["history"]:
            raise DataError(f"{path}: no log of a translation that was evaluated")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cut or edited ({error!r})") from None
    return log
