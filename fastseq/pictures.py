"""Pictures of what a model does; matplotlib (the extra `plot`) is imported when one is drawn."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from .checks import need_tensor
from .errors import InputError, with_article

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["alignment"]

CELL = 0.3  # inches of a cell, while the figure has room
SIDE = 12.0  # inches that all cells may take in either direction
POINTS = (5.0, 10.0)  # smallest and largest letters
LETTERS = 24  # of a label
ABOVE = 1 + 2**-7  # a weight of 1 after sums in bf16
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}  # tokens hold $ and _


def alignment(
    weights: Tensor,  # [T, S], each within 0 and 1, on any device
    source_tokens: Sequence[str],  # S
    target_tokens: Sequence[str],  # T
    *,
    axes: "Axes | None" = None,
    title: str | None = None,
) -> "Axes":
    """Draw attention weights as Bahdanau et al. 2014 do, figure 3: source across, target down, 0 black and 1 white.

    Gives the matplotlib Axes: `axes`, or that of a new figure of a fitting size, which is none of pyplot's:
    `alignment(...).figure.savefig("alignment.png")`. Cells are square unless one side is four times the other. Where
    cells are small, labels are, and then not all are written. A letter that the font lacks is drawn as a box.

    Raises InputError or TypeError, naming the argument; ImportError without matplotlib.
    """
    values, source, target = _checked(weights, source_tokens, target_tokens)
    figure_kind, axes_kind = _matplotlib()
    if not isinstance(axes, axes_kind | None):
        raise TypeError(f"axes must be one matplotlib Axes, got {type(axes).__name__}; pass figure.add_subplot()")
    wide, high = len(source), len(target)
    square = max(wide, high) <= 4 * min(wide, high)
    if axes is None:
        cells = _cells(SIDE / wide, SIDE / high, square)
        left, top = (0.4 + 0.1 * max(map(len, labels)) for labels in (target, source))  # inches, for the labels
        size = (wide * cells[0] + left, high * cells[1] + top + (0.4 if title else 0))
        axes = figure_kind(figsize=size, layout="constrained").add_subplot()
    else:
        box, dpi = axes.get_window_extent(), axes.figure.dpi
        cells = _cells(box.width / dpi / wide, box.height / dpi / high, square)
    aspect: Literal["equal", "auto"] = "equal" if square else "auto"
    axes.imshow(values, cmap="gray", vmin=0, vmax=1, aspect=aspect, origin="upper", interpolation="nearest")
    _label(axes.set_xticks, source, cells[0], 90)
    _label(axes.set_yticks, target, cells[1], 0)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    if title is not None:
        axes.set_title(_written(title), **PLAIN)
    return axes


def _matplotlib() -> tuple[type["Figure"], type["Axes"]]:
    """Its classes, imported when they are first needed; pyplot, which keeps figures and asks for a display, never."""
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib ({error}): pip install fastseq-rnn[plot]") from None
    return Figure, Axes


def _label(set_ticks: Any, labels: list[str], cell: float, rotation: int) -> None:
    """Write as many labels as cells of so many inches have room for."""
    fitting = 0.8 * 72 * cell  # points
    step = max(1, ceil(POINTS[0] / fitting))
    letters = min(POINTS[1], max(POINTS[0], fitting))
    set_ticks(range(0, len(labels), step), labels[::step], rotation=rotation, fontsize=letters, **PLAIN)


def _cells(wide: float, high: float, square: bool) -> tuple[float, float]:
    """Inches of a cell, from what there is room for."""
    wide, high = min(CELL, wide), min(CELL, high)
    return (min(wide, high),) * 2 if square else (wide, high)


def _checked(weights: Any, source: Any, target: Any) -> tuple[list[list[float]], list[str], list[str]]:
    """Plain values, and labels that can be drawn."""
    shape = tuple(need_tensor("weights", weights).shape)
    across, down = _labels("source_tokens", source), _labels("target_tokens", target)
    if shape != (len(down), len(across)) or 0 in shape:
        raise InputError(
            f"weights has shape {shape}, but there are T={len(down)} target and S={len(across)} source tokens, at least"
            " one of each; pass the weights of one pair without its padding: weights[b, :T, :S]"
        )
    values: list[list[float]] = weights.detach().double().tolist()
    for t, row in enumerate(values):
        for s, value in enumerate(row):
            if not 0 <= value <= ABOVE:
                raise InputError(f"weights[{t}, {s}]={value}; weights are 0 to 1: pass them after the softmax")
    return values, across, down


def _labels(name: str, tokens: Any) -> list[str]:
    labels = list(tokens)
    for index, token in enumerate(labels):
        if not isinstance(token, str):
            raise TypeError(
                f"{name}[{index}] is {with_article(type(token).__name__)}; tokens are str: look ids up first"
            )
    return [_written(token) for token in labels]


def _written(text: str) -> str:
    """On one line, and drawable: escapes for newlines, lone surrogates and the like."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
