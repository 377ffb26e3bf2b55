"""The demo's training, killed and started again: python g2p_kills.py FOLDER, as --data takes one.

FOLDER/whole.log and FOLDER/killed.log get a line "STEP LOSS" for each step, and "ended HOW" for each process. Those are
forks, so that torch is imported once; each is killed by SIGKILL, at a moment of its own or from outside.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which optimizers import: once, not in each process

import fastseq
from examples.g2p import __main__ as command
from examples.g2p import recipe
from examples.training import resume, speed
from examples.training.loop import Training
from examples.training.recipe import Recipe

NEVER, EACH_STEP = "1000", "0.0001"  # seconds between saves


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, nth: int) -> Callable[[], None]:
    return lambda: wrap(owner, name, nth, lambda *args: die(), lambda: None)


def after(owner: Any, name: str, nth: int) -> Callable[[], None]:
    return lambda: wrap(owner, name, nth, lambda *args: None, die)


def half_written() -> None:
    def halve(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        die()

    wrap(os, "fsync", 4, halve, lambda: None)


def wrap(owner: Any, name: str, nth: int, first: Callable[..., None], then: Callable[[], None]) -> None:
    """From now on, the nth call of a function has these around it."""
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            first(*args)
        result = real(*args, **kwargs)
        if calls == nth:
            then()
        return result

    setattr(owner, name, wrapped)


def log_steps(log: int) -> None:
    """Each step's loss, to all its bits."""
    step, update, losses = Recipe.step, Training.update, []

    def logged_step(*args: Any) -> torch.Tensor:
        losses.append(step(*args))
        return losses[-1]

    def logged_update(self: Training, *args: Any) -> None:
        update(self, *args)
        os.write(log, f"{self.steps} {losses[-1].item().hex()}\n".encode())

    Recipe.step, Training.update = logged_step, logged_update  # type: ignore[method-assign]


def run(out: Path, pause: str, arm: Callable[[], None] | None) -> None:
    """One process; without `arm` and with EACH_STEP, killed from outside a few steps later."""
    log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_APPEND | os.O_RDWR)
    size = os.fstat(log).st_size
    if not (child := os.fork()):
        torch.set_num_threads(1)
        speed.ROUNDS, command.draw = 1, lambda *args: None  # for time
        log_steps(log)
        if arm is not None:
            arm()
        arguments = ["--steps", "60", "--batch", "32", "--hidden", "16"]
        paths = ["--data", sys.argv[1], "--out", str(out)]
        os._exit(command.main(["train", *arguments, *paths, "--save-every", pause]))
    if arm is None and pause == EACH_STEP:
        while os.fstat(log).st_size < size + 3 * len("10 0x1.0000000000000p+0\n"):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(log, f"ended {status}\n".encode())


def main() -> None:
    folder = Path(sys.argv[1])
    run(folder / "whole", NEVER, None)
    for pause, arm in (
        (NEVER, before(Recipe, "step", 1)),  # nothing is there yet
        (NEVER, after(Recipe, "step", 4)),  # updated, but not counted
        (EACH_STEP, half_written),
        (NEVER, after(recipe, "pronounce", 1)),  # within the first evaluation
        (NEVER, after(fastseq.Seq2Seq, "save", 1)),  # the model is new, the state is not
        (EACH_STEP, None),
        (EACH_STEP, None),
        (EACH_STEP, None),
        (NEVER, before(speed, "compare", 1)),  # trained, and being scored
        (NEVER, before(resume, "remove", 1)),  # done but for this
        (NEVER, None),
    ):
        run(folder / "killed", pause, arm)


if __name__ == "__main__":
    main()
