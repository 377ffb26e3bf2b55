"""What these recipes share: the training loop, random batches, a score of sequences, a command line."""

import argparse
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

Batch = TypeVar("Batch")


def fit(
    model: nn.Module, loss: Callable[[Batch], Tensor], batches: Iterable[Batch], *, steps: int, rate: float
) -> None:
    """Steps of Adam, each on the loss of the next batch; `model` is in eval mode afterwards.

    The learning rate rises to `rate` over a tenth of the steps, then falls to 0 by half a cosine; gradients are clipped
    at norm 1.
    """
    optimizer, warmup = torch.optim.Adam(model.parameters(), rate), max(1, steps // 10)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / warmup, (1 + math.cos(math.pi * n / steps)) / 2))
    model.train()
    columns = TextColumn("training, loss {task.fields[loss]:.3f}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=steps, loss=math.nan)
        for batch in islice(batches, steps):
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=value.item())
    model.eval()


def samples(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of `size` random rows, indices [N], without end."""
    while True:
        yield rows[torch.randint(len(rows), (size,))]


def exact_match(sequences: Tensor, target: Tensor) -> float:
    """The share of sequences [B, L], eos and padding included, that equal the targets [B, T], L <= T."""
    padding = target.new_zeros(len(target), target.shape[1] - sequences.shape[1])
    return (torch.cat([sequences, padding], 1) == target).all(1).float().mean().item()


def command(train: Callable[..., Any]) -> Any:
    """`train` with the options of the command line: its own arguments, all numbers."""
    told, spec = train.__globals__["__doc__"], train.__globals__["__spec__"]
    prog, raw = f"python -m {spec.name}" if spec else None, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, description=told, formatter_class=raw)
    for name, option in inspect.signature(train).parameters.items():
        parser.add_argument(f"--{name}", type=int, default=option.default, help=f"default {option.default}")
    return train(**vars(parser.parse_args()))
