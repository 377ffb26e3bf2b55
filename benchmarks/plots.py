"""Pictures as values, drawn by matplotlib: SVG that takes its colours from the page around it, or PNG on white."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = [
    "INK", "LINE", "MUTED", "PIXELS", "SERIES", "Canvas", "Plot", "Tips", "bare", "below", "beside", "in_words",
    "letters_on",
    "numbered", "png", "svg",
]  # fmt: skip

Canvas = Figure | SubFigure
Tips = Mapping[str, Sequence[str]]  # the gid of a collection of points -> what each point tells when it is pointed at

INK, MUTED, LINE = "#1f2429", "#59636e", "#d0d6dd"
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f")  # Okabe and Ito 2008
OF_PAGE = {  # light or dark
    INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", SERIES[0]: "var(--ours)",
}  # fmt: skip
STYLE = {
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelsize": 9.0, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "fastseq",
    "text.parse_math": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
PIXELS = 96  # of an inch, as CSS has it
DARK, BLACK = 0.5, "#111111"  # a background's lightness; letters on light ones
DPI = 110  # of a PNG
BOLD, HEADING = 0.088, 0.25  # inches: a letter of a title; its line
REFERENCE = re.compile(r"(^|url\()#([\w-]+)")
OWN_FONT = re.compile(r" font-family: [^;]*;")  # the page's serves


@dataclass(frozen=True)
class Plot:
    """One picture, without its title."""

    title: str
    size: tuple[float, float]  # inches
    draw: Callable[[Canvas], Tips]


def beside(title: str, plots: Sequence[Plot], columns: int) -> Plot:
    """One of several, row by row, each under its title."""
    columns = min(columns, len(plots))
    rows = -(-len(plots) // columns)
    wide = max(max(plot.size[0], BOLD * len(plot.title)) for plot in plots) * columns
    high = (max(plot.size[1] for plot in plots) + HEADING) * rows

    def draw(canvas: Canvas) -> Tips:
        grid = canvas.subfigures(rows, columns, squeeze=False).flat
        for plot, part in zip(plots, grid, strict=False):
            part.suptitle(plot.title, x=0.01, ha="left", fontsize=9.5, fontweight="bold", color=INK)
            plot.draw(part)
        return {}

    return Plot(title, (wide, high), draw)


def bare(axes: Axes) -> None:
    """Without spines, ticks and grid."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def below(axes: Axes, names: Sequence[str]) -> None:
    """Names of the places 0, 1, ... across, of one or several lines, each centred: SVG's would not be."""
    axes.set_xticks([])
    for x, name in enumerate(names):
        for k, part in enumerate(name.split("\n")):
            axes.annotate(
                part, (x, 0), (0, -4 - 11 * k), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                ha="center", va="top", color=MUTED, fontsize=8.5,
            )  # fmt: skip


def letters_on(colour: Any) -> str:
    """Black or white, whichever is read better."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < DARK else BLACK


def numbered(axis: Axis, subs: Sequence[float] = (1.0,)) -> None:
    """A logarithmic axis with plain numbers at these parts of each decade."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def png(plot: Plot) -> bytes:
    """On white; the same bytes each time."""
    file = io.BytesIO()
    with _figure(plot) as (figure, _):
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def svg(plot: Plot, prefix: str) -> str:
    """An element for a page, whose variables --muted, --line and --ours it uses. prefix: of its ids."""
    file = io.StringIO()
    with _figure(plot) as (figure, tips):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    _tell(root, tips)
    _own_names(root, prefix)
    wide, high = (round(side * PIXELS) for side in plot.size)
    root.attrib = {"viewBox": root.attrib["viewBox"], "width": str(wide), "height": str(high), "role": "img"}
    title = ElementTree.Element("title")
    title.text = plot.title
    root.insert(0, title)
    text = OWN_FONT.sub("", ElementTree.tostring(root, encoding="unicode"))
    for colour, of_page in OF_PAGE.items():
        text = text.replace(colour, of_page)
    return text


def in_words(threads: int) -> str:
    """How many."""
    return "1 thread" if threads == 1 else f"{threads} threads"


@contextmanager
def _figure(plot: Plot) -> Iterator[tuple[Figure, Tips]]:
    """Drawn with this module's settings whatever the user's are; none of pyplot's."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=plot.size, layout="constrained")
        yield figure, plot.draw(figure)


def _tell(root: ElementTree.Element, tips: Tips) -> None:
    """A <title> for each point of the collections that `tips` names."""
    for gid, texts in tips.items():
        (group,) = (element for element in root.iter() if element.get("id") == gid)
        points = [element for element in group.iter() if _local(element.tag) == "use"]
        for point, text in zip(points, texts, strict=True):
            ElementTree.SubElement(point, "title").text = text


def _own_names(root: ElementTree.Element, prefix: str) -> None:
    """As HTML has them: no namespaces, metadata and styles for all; only ids that are referred to, after the prefix."""
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    used = {name for e in root.iter() for value in e.attrib.values() for _, name in REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        if attributes.get("id", "") not in used:
            attributes.pop("id", None)
        element.attrib = {
            name: f"{prefix}{value}" if name == "id" else REFERENCE.sub(rf"\1#{prefix}\2", value)
            for name, value in attributes.items()
        }


def _local(name: str) -> str:
    return name.rpartition("}")[2]
