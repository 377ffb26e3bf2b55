"""python -m examples.g2p train | say WORD..."""

import argparse
import math
import sys
from pathlib import Path

import torch
from rich.console import Console

from . import checkpoint, data, speed
from .model import Config, Model
from .picture import draw
from .progress import Display
from .stock import StockModel
from .train import Plan, Training, evaluate

LIBRARIES: dict[str, type[Model]] = {"fastseq": Model, "torch": StockModel}
OUT = Path("build/g2p")
NEW_WORDS = ["fastseq", "pytorch", "tokenizer", "backpropagation", "blogosphere", "zumba", "wordle", "kubernetes"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m examples.g2p", description="Learn how words are pronounced.")
    commands = top.add_subparsers(required=True, metavar="train|say")
    train_ = commands.add_parser("train", help="train, score, and leave a checkpoint and a picture")
    train_.add_argument("--data", type=Path, metavar="DIR", help="*.train.tsv and *.test.tsv; default: CMUdict")
    train_.add_argument("--minutes", type=positive, default=Plan.minutes, help="of training (default %(default)s)")
    train_.add_argument("--steps", type=count, help="train so many steps instead: the same result every time")
    train_.add_argument("--batch", type=count, default=Plan.batch, help="words a step (default %(default)s)")
    train_.add_argument("--hidden", type=count, default=Config.hidden, help="units per layer (default %(default)s)")
    train_.add_argument("--layers", type=layers, default=Config.layers, help="of either side (default %(default)s)")
    train_.add_argument("--library", choices=LIBRARIES, default="fastseq", help="whose layers (default %(default)s)")
    train_.add_argument("--seed", type=int, default=Plan.seed)
    train_.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="results (default %(default)s)")
    train_.set_defaults(run=train)
    say_ = commands.add_parser("say", help="pronounce words with a checkpoint")
    say_.add_argument("words", nargs="+", metavar="WORD")
    say_.add_argument("--checkpoint", type=Path, default=OUT / "model.pt", metavar="FILE")
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
    letters, phonemes = data.alphabet(splits.train)
    pairs = data.encode(splits.train, letters, phonemes)
    torch.manual_seed(options.seed)
    config = Config(letters, phonemes, options.hidden, options.layers, limit=2 * pairs.target.shape[1])
    model = LIBRARIES[options.library](config)
    console.print(
        f"words: {len(splits.train):,} to train on, {len(splits.dev):,} development, {len(splits.test):,} held out; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {torch.get_num_threads()} threads"
    )
    plan = Plan(options.minutes, options.steps, options.batch, seed=options.seed)
    path = options.out / "model.pt"
    model = fit(model, pairs, splits, plan, path, console)
    console.print(f"held-out words: {evaluate(model, splits.test)}")
    console.print(f"training speed: {speed.compare(model, pairs, plan)}")
    known = splits.train.keys() | splits.dev.keys() | splits.test.keys()
    words = [word for word in (in_case(word, letters) for word in NEW_WORDS) if word is not None and word not in known]
    if words:
        console.print("words the dictionary lacks:")
        show(model, words, console)
    draw(model, (words or list(splits.test))[:4], options.out / "attention.png")
    console.print(f"checkpoint: {path}   attention: {options.out / 'attention.png'}")
    return 0


def fit(model: Model, pairs: data.Pairs, splits: data.Splits, plan: Plan, path: Path, console: Console) -> Model:
    """Train; the model that was best on the development set, also when Ctrl-C ended it early."""
    training = Training(model, pairs, splits.dev, plan, lambda: checkpoint.save(model, path))
    try:
        with Display(console) as display:
            training.run(display)
    except KeyboardInterrupt:
        console.print("interrupted: the scores are those of the last checkpoint")
        if training.best == math.inf:  # none yet
            checkpoint.save(model, path)
    best = checkpoint.load(path)
    console.print(
        f"trained {training.steps:,} steps in {training.seconds():.0f} s; development set: {evaluate(best, splits.dev)}"
    )
    return best


def say(options: argparse.Namespace) -> int:
    model = checkpoint.load(options.checkpoint)
    words = []
    for word in options.words:
        if (form := in_case(word, model.config.letters)) is None:
            raise data.DataError(
                f"{word!r} has letters that the model never saw; it knows {''.join(model.config.letters)}"
            )
        words.append(form)
    show(model, words, Console(highlight=False, soft_wrap=True))
    return 0


def in_case(word: str, letters: list[str]) -> str | None:
    """The word in the case in which the model knows its letters; None if there is none."""
    return next((form for form in (word, word.lower(), word.upper()) if form and set(form) <= set(letters)), None)


def show(model: Model, words: list[str], console: Console) -> None:
    width = max(map(len, words))
    for word, phonemes in zip(words, model.pronounce(words), strict=True):
        console.print(f"  {word:{width}}  {' '.join(phonemes)}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
