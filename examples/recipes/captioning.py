"""Captioning: what stands where in an image, by a decoder that attends to a grid of features (Xu et al. 2015).

python -m examples.recipes.captioning      # generated images -> "a red ring left of a blue cross"
"""

import torch
from torch import Tensor, nn

import fastseq

from ..training.batches import BOS, EOS, PAD, pad
from .fit import command, exact_match, fit, samples

SHAPES = {"ring": [[1, 1, 1], [1, 0, 1], [1, 1, 1]], "cross": [[0, 1, 0], [1, 1, 1], [0, 1, 0]], "block": 3 * [3 * [1]]}
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 0.9), "yellow": (0.9, 0.8, 0.1)}
OBJECTS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
WORDS = ["<pad>", "<bos>", "<eos>", "a", "above", "left", "of", *COLOURS, *SHAPES]


def draw(words: list[str]) -> Tensor:
    """An image [3, 8, 8] of what a caption says, with noise."""
    ahead, aside = int(torch.randint(3, 6, ())), int(torch.randint(-1, 2, ()))
    down, right = (ahead, aside) if "above" in words else (aside, ahead)
    y, x = (int(torch.randint(max(0, -step), 6 - max(0, step), ())) for step in (down, right))
    image = 0.2 * torch.rand(3, 8, 8)
    for colour, shape, y0, x0 in ((*words[1:3], y, x), (*words[-2:], y + down, x + right)):
        image[:, y0 : y0 + 3, x0 : x0 + 3] += torch.tensor(COLOURS[colour]).view(3, 1, 1) * torch.tensor(SHAPES[shape])
    return image


class ImageEncoder(nn.Module):
    """Images [B, 3, 8, 8] to a memory [B, 64, features] of their pixels; the last two features are y and x."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, features - 2, 3, padding=1))
        self.register_buffer("places", torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 8)]).T.view(2, 8, 8))

    def forward(self, images: Tensor, lengths: None = None) -> fastseq.Memory:
        grid = torch.cat([self.conv(images).relu(), self.places.expand(len(images), -1, -1, -1)], 1)
        return fastseq.Memory(grid.flatten(2).mT)


def train(steps: int = 450, seed: int = 0, copies: int = 10) -> tuple[fastseq.Seq2Seq, float, float]:
    """A model, the share of images with unseen captions that it describes right to the word; that of the commonest."""
    torch.manual_seed(seed)
    captions = [f"{one} {how} {two}".split() for one in OBJECTS for how in ("above", "left of") for two in OBJECTS]
    images = torch.stack([draw(words) for words in copies * captions])
    target, _ = pad(copies * [[WORDS.index(word) for word in ("<bos>", *words, "<eos>")] for words in captions])
    rows = torch.arange(len(images)).view(copies, -1)[:, torch.randperm(len(captions))]
    held_out, rest = rows[:, :48].flatten(), rows[:, 48:].flatten()
    decoder = fastseq.Decoder.bahdanau(32, 96, memory_size=64, bridge=fastseq.Bridge("mean", act="tanh"))
    model = fastseq.Seq2Seq(ImageEncoder(64), decoder, len(WORDS), bos_id=BOS, eos_id=EOS, pad_id=PAD)
    fit(model, lambda i: model.loss(images[i], target[i]), samples(rest, 32), steps=steps, rate=8e-3)
    found = model.generate(images[held_out], max_new_tokens=9).sequences[:, 0]
    return model, exact_match(found, target[held_out, 1:]), 1 / 48


if __name__ == "__main__":
    print("images captioned right: {:.1%}; by the commonest caption: {:.1%}".format(*command(train)[1:]))
