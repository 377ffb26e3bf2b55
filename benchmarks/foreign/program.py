"""What a program of another package is to the runner."""

import contextlib
import io
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Convert", "Learned", "Program", "quiet", "seed"]

Convert = Callable[[nn.Module], object]  # `fastseq.accelerate`, or nothing


class Learned(NamedTuple):
    """What a run leaves, to be compared with the other side's."""

    losses: list[float]  # one an update, or what the package reports of several
    tensors: list[Tensor]  # the trained parameters, and forecasts


@dataclass(frozen=True)
class Program:
    """One program: an entry of `packages.PROGRAMS`."""

    distribution: str  # as PyPI has it
    what: str  # model, sizes, training
    way: str  # "accelerate" | "patch"
    build: Callable[[Convert], object]  # the package's model, given to `convert` where it can be reached
    run: Callable[[object], Learned]  # trains what build made; this is timed


def seed() -> None:
    """Every generator that a package may draw from."""
    import numpy

    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - the generator that they use
    torch.manual_seed(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what packages print and warn of; what they log goes to stderr."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
