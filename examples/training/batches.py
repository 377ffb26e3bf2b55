"""Pairs of sequences as padded ids, shuffled and batched by length."""

from typing import NamedTuple

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2  # ids of the target; PAD of the source too


class Pairs(NamedTuple):
    """Every (source, target) of a data set."""

    source: Tensor  # [N, S]
    source_length: Tensor  # [N]
    target: Tensor  # [N, T + 1]: BOS ... EOS
    target_length: Tensor  # [N], BOS and EOS counted


class Batch(NamedTuple):
    source: Tensor  # [B, S]
    target: Tensor  # [B, T + 1]
    length: Tensor | None  # [B]; None if every row fills S: nothing needs masking then

    @property
    def tokens(self) -> int:
        """Targets that are predicted: EOS counted, BOS and padding not."""
        return int((self.target[:, 1:] != PAD).sum())


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids [N, longest], lengths [N]) of rows of several lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PAD)
    ids[torch.arange(ids.shape[1]) < lengths[:, None]] = torch.tensor([i for row in rows for i in row])
    return ids, lengths


def batches(pairs: Pairs, size: int, generator: torch.Generator) -> list[Batch]:
    """An epoch of shuffled batches of at most `size` rows.

    Sources of a batch have one length, so nothing of the source is padding; of that length, rows of nearly the same
    target length come together. What is left over of each length makes the few batches that need `length`.
    """
    noise = torch.rand(len(pairs.source), generator=generator)
    stride = pairs.target.shape[1] + 2  # the source length decides first
    order = torch.argsort(stride * pairs.source_length + pairs.target_length + 2 * noise)
    chunks, rest = [], []
    for group in order.split(torch.bincount(pairs.source_length).tolist()):
        full = len(group) // size * size
        start = int(torch.randint(len(group) - full + 1, (), generator=generator))
        chunks += group[start : start + full].split(size)
        rest += [group[:start], group[start + full :]]
    chunks += torch.cat(rest).split(size)
    chunks = [rows for rows in chunks if len(rows)]  # torch splits nothing into one chunk of nothing
    return [gather(pairs, chunks[i]) for i in torch.randperm(len(chunks), generator=generator).tolist()]


def in_order(pairs: Pairs, size: int) -> list[Batch]:
    """All pairs, the shortest sources first, in batches of at most `size` rows."""
    order = torch.argsort(pairs.source_length, stable=True)
    return [gather(pairs, rows) for rows in order.split(size)]


def gather(pairs: Pairs, rows: Tensor) -> Batch:
    """These rows, without columns that are all padding."""
    length, steps = pairs.source_length[rows], int(pairs.target_length[rows].max())
    longest = int(length.max())
    even = int(length.min()) == longest
    return Batch(pairs.source[rows, :longest], pairs.target[rows, :steps], None if even else length)
