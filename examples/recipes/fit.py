"""The training loop of these recipes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

Batch = TypeVar("Batch")


def fit(
    model: nn.Module, loss: Callable[[Batch], Tensor], batches: Iterable[Batch], *, steps: int, rate: float
) -> None:
    """Steps of Adam, each on `loss` of the next batch; `model` is in eval mode afterwards.

    The rate rises to `rate` over a tenth of the steps and then falls to 0; gradients are clipped at norm 1.
    """
    optimizer = torch.optim.Adam(model.parameters())
    schedule = OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    model.train()
    for batch in track(islice(batches, steps), "training", total=steps, transient=True):
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def draws(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of so many of the rows, indices [N], without end."""
    while True:
        yield rows[torch.randint(len(rows), (size,))]
