"""Which letters the decoder attended to while it said each phoneme, as a PNG."""

from pathlib import Path

from matplotlib.figure import Figure

from .data import spell
from .model import Model


def draw(model: Model, words: list[str], path: Path) -> None:
    """One panel per word: letters across, phonemes down, dark where the attention is."""
    figure = Figure(figsize=(3.4 * len(words), 3.8), layout="constrained")
    for axes, word in zip(figure.subplots(1, len(words), squeeze=False)[0], words, strict=True):
        ids, attention = model.greedy(*spell([word], model.config.letters))
        phonemes = [*model.phonemes_of(ids[0].tolist()), "end"]
        axes.imshow(attention[0, : len(phonemes)].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(word)), list(word))
        axes.set_yticks(range(len(phonemes)), phonemes)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    figure.savefig(path, dpi=150)
