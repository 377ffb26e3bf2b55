"""python -m examples.g2p train | say WORD..."""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

import fastseq

from . import data, resume, speed
from .model import Model, build, load, pronounce
from .progress import Display
from .stock import StockModel
from .train import Plan, Training, evaluate

LIBRARIES: dict[str, Callable[[fastseq.Seq2Seq], Model]] = {"fastseq": copy.deepcopy, "torch": StockModel}
OUT = Path("build/g2p")
MODEL, STATE, PICTURE = "model.safetensors", "training.safetensors", "attention.png"  # what stands there
NEW_WORDS = ["fastseq", "pytorch", "tokenizer", "backpropagation", "blogosphere", "zumba", "wordle", "kubernetes"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (data.DataError, fastseq.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m examples.g2p", description="Learn how words are pronounced.")
    commands = top.add_subparsers(required=True, metavar="train|say")
    train_ = commands.add_parser(
        "train", help="train, score, and leave a model and a picture; go on if that was cut short"
    )
    train_.add_argument("--data", type=Path, metavar="DIR", help="*.train.tsv and *.test.tsv; default: CMUdict")
    train_.add_argument("--minutes", type=positive, default=Plan.minutes, help="of training (default %(default)s)")
    train_.add_argument("--steps", type=count, help="train so many steps instead: the same result every time")
    train_.add_argument("--batch", type=count, default=Plan.batch, help="words a step (default %(default)s)")
    train_.add_argument("--hidden", type=count, default=Plan.hidden, help="units per layer (default %(default)s)")
    train_.add_argument("--layers", type=layers, default=Plan.layers, help="of either side (default %(default)s)")
    train_.add_argument("--library", choices=LIBRARIES, default=Plan.library, help="whose layers (default %(default)s)")
    train_.add_argument("--seed", type=int, default=Plan.seed)
    train_.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="results (default %(default)s)")
    train_.add_argument("--fresh", action="store_true", help="start anew where a run was cut short")
    train_.add_argument(
        "--save-every",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="what a kill may cost (default %(default)s)",
    )
    train_.set_defaults(run=train)
    say_ = commands.add_parser("say", help="pronounce words with a trained model")
    say_.add_argument("words", nargs="+", metavar="WORD")
    say_.add_argument("--checkpoint", type=Path, default=OUT / MODEL, metavar="FILE")
    for command in (train_, say_):
        command.add_argument("--beams", type=count, default=1, help="of the search, when done (default: greedy)")
    say_.set_defaults(run=say)
    return top


def positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text: str, least: int = 1) -> int:
    if (value := int(text)) < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


def layers(text: str) -> int:
    return count(text, least=2)


def train(options: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be written costs no training
    splits = data.load(options.data)
    plan = Plan(
        options.minutes, options.steps, options.batch, seed=options.seed, hidden=options.hidden, layers=options.layers,
        library=options.library,
    )  # fmt: skip
    training = start(splits, plan, options)
    console.print(
        f"words: {len(splits.train):,} to train on, {len(splits.dev):,} development, {len(splits.test):,} held out; "
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters; {torch.get_num_threads()} threads"
    )
    ended = fit(training, options.out, console)
    model = load(options.out / MODEL)
    trained = f"trained {training.steps:,} steps in {training.seconds():.0f} s"
    console.print(f"{trained}; development set: {evaluate(model, splits.dev)}")
    console.print(f"held-out words: {evaluate(model, splits.test, options.beams)}")
    console.print(f"training speed: {speed.compare(model, training.pairs, plan)}")
    show_new(model, splits, options, console)
    console.print(f"model: {options.out / MODEL}   attention: {options.out / PICTURE}")
    if ended:
        resume.remove(options.out / STATE)
    return 0


def start(splits: data.Splits, plan: Plan, options: argparse.Namespace) -> Training:
    """The run at its first step, or where it was when it was cut short."""
    letters, phonemes = data.alphabet(splits.train)
    pairs = data.encode(splits.train, letters, phonemes)
    torch.manual_seed(plan.seed)
    best = build(letters, phonemes, plan.hidden, plan.layers, limit=2 * (pairs.target.shape[1] - 1))
    wanted = asdict(plan) | {"data": data.digest(splits)}
    path = options.out / STATE

    def save(training: Training, better: bool) -> None:
        if better:
            training.best.save(options.out / MODEL)
        tensors, numbers = training.state()
        resume.save(path, tensors, numbers | {"plan": wanted})

    training = Training(LIBRARIES[plan.library](best), best, pairs, splits.dev, plan, save, options.save_every)
    if options.fresh:
        resume.remove(path)
    if path.exists():
        tensors, numbers = resume.load(path)
        resume.need_same(path, numbers["plan"], wanted)
        training.restore(tensors, numbers)
    return training


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
        console.print(
            f"interrupted: the best model so far is scored; the same command goes on behind step {training.steps:,}"
        )
        return False
    return True


def say(options: argparse.Namespace) -> int:
    model = load(options.checkpoint)
    letters, words = model.extra["letters"], []
    for word in options.words:
        if (form := in_case(word, letters)) is None:
            raise data.DataError(f"{word!r} has letters that the model never saw; it knows {''.join(letters)}")
        words.append(form)
    show(model, words, options.beams, Console(highlight=False, soft_wrap=True))
    return 0


def show_new(model: fastseq.Seq2Seq, splits: data.Splits, options: argparse.Namespace, console: Console) -> None:
    """Say and draw words that the dictionary lacks."""
    forms = (in_case(word, model.extra["letters"]) for word in NEW_WORDS)
    words = [word for word in forms if word is not None and not any(word in part for part in splits)]
    if words:
        console.print("words the dictionary lacks:")
        show(model, words, options.beams, console)
    draw(model, (words or list(splits.test))[:4], options.out / PICTURE)


def draw(model: fastseq.Seq2Seq, words: list[str], path: Path) -> None:
    """Which letters the decoder attended to while it said each phoneme: a panel per word, white where it did."""
    figure, names = Figure(figsize=(3.4 * len(words), 3.8), layout="constrained"), model.extra["phonemes"]
    for axes, word in zip(figure.subplots(1, len(words), squeeze=False)[0], words, strict=True):
        source, _ = data.spell([word], model.extra["letters"])
        found = model.generate(source, max_new_tokens=model.extra["limit"], return_weights=True)
        said = ["end" if i < data.SPECIAL else names[i - data.SPECIAL] for i in found.sequences[0, 0].tolist()]
        fastseq.pictures.alignment(found.weights[0, 0], list(word), said, axes=axes)
    figure.savefig(path, dpi=150)


def in_case(word: str, letters: list[str]) -> str | None:
    """The word in the case in which the model knows its letters; None if there is none."""
    return next((form for form in (word, word.lower(), word.upper()) if form and set(form) <= set(letters)), None)


def show(model: Model, words: list[str], beams: int, console: Console) -> None:
    width = max(map(len, words))
    for word, phonemes in zip(words, pronounce(model, words, beams), strict=True):
        console.print(f"  {word:{width}}  {' '.join(phonemes)}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
