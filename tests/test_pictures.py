"""fastseq.pictures.alignment: what stands where, looked at in ticks and pixels."""

import io
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import InputError
from fastseq.pictures import alignment

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402

SOURCE, TARGET = ["the", "cat", "sat", "."], ["le", "chat", "."]
WEIGHTS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.75, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])


def drawn(axes: Any) -> Any:
    """[height, width] greys, 0 to 1, of the figure as a PNG; at the same time, that it can be drawn."""
    file = io.BytesIO()
    axes.figure.savefig(file, format="png")
    file.seek(0)
    return torch.tensor(imread(file)[..., :3].mean(-1).tolist())


def cell(axes: Any, picture: Tensor, t: int, s: int) -> float:
    """The grey of a cell's middle."""
    x, y = axes.transData.transform((s, t))
    return float(picture[picture.shape[0] - 1 - round(y), round(x)])


def labels(axis: Any) -> list[Any]:
    return [text for text in axis.get_ticklabels() if text.get_text()]


def test_as_in_the_paper() -> None:
    """Source across on top, target downwards, black to white, labels turned, cells square."""
    axes = alignment(WEIGHTS, SOURCE, TARGET, title="one sentence")
    picture = drawn(axes)
    for t, row in enumerate(WEIGHTS.tolist()):
        for s, value in enumerate(row):
            assert abs(cell(axes, picture, t, s) - value) <= 1 / 255
    across, down = labels(axes.xaxis), labels(axes.yaxis)
    assert [text.get_text() for text in across] == SOURCE
    assert [text.get_text() for text in down] == TARGET
    assert {text.get_rotation() for text in across} == {90.0}
    assert {text.get_rotation() for text in down} == {0.0}
    assert all(axes.transAxes.inverted().transform(t.get_window_extent().p0)[1] >= 1 for t in across)  # on top
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)])
    assert x1 - x0 == pytest.approx(y0 - y1)
    assert y1 < y0
    assert axes.get_title() == "one sentence"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_of_any_kind(dtype: torch.dtype) -> None:
    weights = WEIGHTS.to(dtype).T.contiguous().T.requires_grad_()
    axes = alignment(weights, tuple(SOURCE), TARGET)
    assert axes.images[0].get_array().tolist() == WEIGHTS.tolist()
    assert weights.grad is None


def test_axes_of_the_caller() -> None:
    figure = Figure(figsize=(8, 4))
    left, right = figure.subplots(1, 2)
    assert alignment(WEIGHTS, SOURCE, TARGET, axes=left) is left
    assert alignment(WEIGHTS.T, TARGET, SOURCE, axes=right) is right
    picture = drawn(left)
    assert cell(left, picture, 0, 0) == cell(right, picture, 3, 2) == 1
    assert cell(left, picture, 0, 3) == cell(right, picture, 3, 0) == 0


def figures() -> list[int] | None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return None if pyplot is None else pyplot.get_fignums()


def test_pyplot_is_left_alone() -> None:
    """Neither imported nor given a figure."""
    before = figures()
    drawn(alignment(WEIGHTS, SOURCE, TARGET))
    assert figures() == before


SETTINGS: list[dict[str, Any]] = [{"image.origin": "lower", "image.cmap": "viridis"}, {"text.usetex": True}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_change_neither_colours_nor_labels(settings: dict[str, Any]) -> None:
    with matplotlib.rc_context(settings):
        axes = alignment(WEIGHTS, ["$", "_", "\\frac", "%"], TARGET, title="$_")
        picture = drawn(axes)
    assert cell(axes, picture, 0, 0) == cell(axes, picture, 2, 3) == 1


HARD = ["$x_1$", "a_b^c", "$", "\\frac{", "", " ", "#&%~{}", "<unk>", "▁the", "é", "a" * 100]


def test_labels_are_taken_as_they_are() -> None:
    axes = alignment(torch.eye(len(HARD)), HARD, HARD, title="$\\frac_{")
    drawn(axes)
    assert [text.get_text() for text in axes.xaxis.get_ticklabels()] == [*HARD[:-1], "a" * 23 + "…"]
    assert not any(text.get_parse_math() for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels())
    assert axes.get_title() == "$\\frac_{"


@pytest.mark.filterwarnings("ignore:Glyph .* missing:UserWarning", "ignore:Matplotlib currently does not support")
def test_letters_that_cannot_be_drawn() -> None:
    """Those that the font lacks are boxes, those of no font are escaped."""
    tokens = ["日本語", "שלום", "हिन्दी", "🙂", "\ud800", "a\nb", "\t", "\0", "\x1b[0m"]
    axes = alignment(torch.eye(9), tokens, tokens, title="日\n本")
    drawn(axes)
    assert [t.get_text() for t in axes.yaxis.get_ticklabels()] == [
        *tokens[:4], "\\ud800", "a\\nb", "\\t", "\\x00", "\\x1b[0m",
    ]  # fmt: skip


@pytest.mark.parametrize(("T", "S"), [(1, 1), (2, 50), (40, 40), (200, 150), (1, 1000), (700, 3)])
def test_any_length_stays_readable(T: int, S: int) -> None:
    """The figure has a limit, letters have one too, and no label lies on its neighbour."""
    axes = alignment(torch.full((T, S), 1 / S), [f"s{n}" for n in range(S)], [f"t{n}" for n in range(T)])
    picture = drawn(axes)
    assert max(axes.figure.get_size_inches()) <= 13.5
    assert max(picture.shape) <= 1350
    across, down = labels(axes.xaxis), labels(axes.yaxis)
    for texts, prefix, edge in ((across, "s", "x0"), (down, "t", "y0")):
        assert all(5 <= text.get_fontsize() <= 10 for text in texts)
        ids = [int(text.get_text()[1:]) for text in texts]
        assert [text.get_text()[0] for text in texts] == [prefix] * len(texts)
        assert ids == list(range(0, (S, T)[prefix == "t"], ids[1] if len(ids) > 1 else 1))
        starts = [getattr(text.get_window_extent(), edge) for text in texts]
        gaps = [abs(b - a) for a, b in pairwise(starts)]
        assert all(gap >= texts[0].get_fontsize() / 72 * axes.figure.dpi for gap in gaps)
    assert all(text.get_window_extent().x0 >= 0 for text in down)
    assert all(text.get_window_extent().y1 <= picture.shape[0] for text in across)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "turned": (
        lambda: alignment(WEIGHTS.T, SOURCE, TARGET), InputError,
        r"weights has shape \(4, 3\), but there are T=3 target and S=4 source tokens, .*weights\[b, :T, :S\]",
    ),
    "batch": (lambda: alignment(WEIGHTS[None], SOURCE, TARGET), InputError, r"shape \(1, 3, 4\), but .* one pair"),
    "padding": (lambda: alignment(WEIGHTS, SOURCE[:3], TARGET), InputError, r"T=3 target and S=3 source"),
    "nothing": (lambda: alignment(torch.zeros(0, 4), SOURCE, []), InputError, r"T=0 target .* at least one of each"),
    "logits": (lambda: alignment(WEIGHTS * 4, SOURCE, TARGET), InputError, r"weights\[0, 0\]=4\.0; weights are 0 to 1"),
    "negative": (lambda: alignment(-WEIGHTS, SOURCE, TARGET), InputError, r"weights\[0, 0\]=-1\.0"),
    "nan": (lambda: alignment(WEIGHTS * torch.nan, SOURCE, TARGET), InputError, r"weights\[0, 0\]=nan"),
    "list": (lambda: alignment([[1.0]], ["a"], ["b"]), TypeError, r"weights must be a torch\.Tensor, got list"),
    "ids": (lambda: alignment(WEIGHTS, [1, 2, 3, 4], TARGET), TypeError, r"source_tokens\[0\] is an int; tokens are"),
    "axes": (
        lambda: alignment(WEIGHTS, SOURCE, TARGET, axes=Figure()), TypeError, r"axes must be one matplotlib Axes, got",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib \(.*\): pip install fastseq-rnn\[plot\]"):
        fastseq.pictures.alignment(WEIGHTS, SOURCE, TARGET)
