"""What the command lines of recipes share: their options, where a run is kept, and how one goes on."""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

import fastseq

from . import resume
from .files import DataError
from .loop import Training
from .progress import Display
from .recipe import LIBRARIES, PRECISIONS, Plan, Recipe

MODEL, STATE, LOG = "model.safetensors", "training.safetensors", "log.json"  # what stands in a run's folder

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def run(options: argparse.Namespace) -> int:
    """`options.run(options)`; the exit status: 2 after a fault of the user's files or options, 130 after Ctrl-C."""
    try:
        status: int = options.run(options)
    except (DataError, fastseq.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def probability(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability from 0 to below 1")
    return value


def count(text: str, least: int = 1) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


def add_options(parser: argparse.ArgumentParser, plan: Plan, pause: str, **more: dict[str, Any]) -> None:
    """Options of `train`: fields of the plan, `more` of them by name, and how a run is kept.

    They are None unless given; the help tells the defaults: those of `plan`, and of `pause`, the seconds between two
    states of a run.
    """
    fields: dict[str, Any] = {
        "minutes": {"type": positive, "help": "of training"},
        "steps": {"type": count, "help": "train so many steps instead: the same result every time"},
        "batch": {"type": count, "help": "rows a step"},
        **more,
        "library": {"choices": LIBRARIES, "help": "whose layers"},
        "precision": {"choices": PRECISIONS, "help": "of training; bf16 pays on CPUs that multiply in it"},
        "evaluations": {"type": count, "help": "of the development set; each takes time from training"},
        "seed": {"type": int, "help": "of parameters, batches and dropout"},
    }
    for name, options in fields.items():
        default = getattr(plan, name)
        told = options["help"] + ("" if default is None else f" (default {default})")
        parser.add_argument(f"--{name}", **options | {"help": told})
    parser.add_argument("--fresh", action="store_true", help="start anew where a run was cut short")
    told = f"what a kill may cost (default {pause})"
    parser.add_argument("--save-every", type=positive, metavar="SECONDS", help=told)


def threads() -> str:
    """How many compute."""
    n = torch.get_num_threads()
    return "1 thread" if n == 1 else f"{n} threads"


def planned(options: argparse.Namespace, plan: AnyPlan) -> AnyPlan:
    """The plan with those of its fields that are given as options."""
    given = {name: getattr(options, name, None) for name in asdict(plan)}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def start(recipe: Recipe, out: Path, fresh: bool, pause: float) -> Training:
    """The run at its first step, or where it was when it was cut short; kept in `out`, with a log."""
    torch.manual_seed(recipe.plan.seed)
    wanted, path = described(recipe), out / STATE

    def save(training: Training, better: bool) -> None:
        if better:
            training.best.save(out / MODEL)
        tensors, numbers = training.state()
        resume.save(path, tensors, numbers | {"plan": wanted})
        note(training, out)

    training = Training(recipe, recipe.build(), save, pause)
    if fresh:
        resume.remove(path)
    if path.exists():
        tensors, numbers = resume.load(path)
        resume.need_same(path, numbers["plan"], wanted)
        training.restore(tensors, numbers)
    return training


def described(recipe: Recipe) -> dict[str, Any]:
    """All that one run has different from another."""
    return {"recipe": recipe.name} | asdict(recipe.plan) | {"data": recipe.digest}


def note(training: Training, out: Path, **more: Any) -> None:
    """Write the log: plan, threads, a row for each evaluation, and `more`; replaced whole or not at all."""
    log = {"plan": described(training.recipe), "threads": torch.get_num_threads(), "history": training.history}
    partial = (out / LOG).with_suffix(".new")
    partial.write_text(json.dumps(log | more, indent=1))
    partial.replace(out / LOG)


def fit(training: Training, out: Path, console: Console) -> bool:
    """Train; whether to the end of the plan: Ctrl-C ends it early, and leaves the best model so far."""
    if training.steps:
        console.print(
            f"going on behind step {training.steps:,}, after {training.seconds():.0f} s: {training.done():.0%}"
        )
    if training.lowest < math.inf:
        training.best.save(out / MODEL)  # the file may be of a later moment, which will now come again
    try:
        with Display(console) as display:
            training.run(display)
    except KeyboardInterrupt:
        if (out / STATE).exists():  # as it was last saved: this may be the middle of a step
            training.restore(*resume.load(out / STATE))
        if training.lowest == math.inf:  # none yet
            training.best.load_state_dict(training.model.state_dict())
        training.best.save(out / MODEL)
        return False
    return True
