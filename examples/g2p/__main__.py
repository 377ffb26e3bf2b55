"""python -m examples.g2p train | say WORD..."""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

import fastseq

from ..training import resume, speed
from ..training.command import MODEL, STATE, add_options, count, fit, note, planned, run, start, threads
from ..training.files import DataError
from . import data
from .model import Model, load, pronounce
from .recipe import FULL, Plan, Recipe, evaluate

OUT = Path("build/g2p")
PICTURE = "attention.png"
NEW_WORDS = ["fastseq", "pytorch", "tokenizer", "backpropagation", "blogosphere", "zumba", "wordle", "kubernetes"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run(parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m examples.g2p", description="Learn how words are pronounced.")
    commands = top.add_subparsers(required=True, metavar="train|say")
    train_ = commands.add_parser(
        "train", help="train, score, and leave a model and a picture; go on if that was cut short"
    )
    train_.add_argument("--data", type=Path, metavar="DIR", help="*.train.tsv and *.test.tsv; default: CMUdict")
    train_.add_argument(
        "--full",
        action="store_true",
        help=f"{FULL.layers} layers of {FULL.hidden}, for the papers' split; {FULL.minutes:.0f} minutes",
    )
    add_options(
        train_,
        Plan(),
        "10; with --full 60",
        hidden={"type": count, "help": "units per layer"},
        layers={"type": layers, "help": "of either side"},
    )
    train_.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="results (default %(default)s)")
    train_.set_defaults(run=train)
    say_ = commands.add_parser("say", help="pronounce words with a trained model")
    say_.add_argument("words", nargs="+", metavar="WORD")
    say_.add_argument("--checkpoint", type=Path, default=OUT / MODEL, metavar="FILE")
    for command in (train_, say_):
        command.add_argument("--beams", type=count, default=1, help="of the search, when done (default: greedy)")
    say_.set_defaults(run=say)
    return top


def layers(text: str) -> int:
    return count(text, least=2)


def train(options: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be written costs no training
    splits = data.load(options.data)
    recipe = Recipe(splits, planned(options, FULL if options.full else Plan()))
    pause = options.save_every or (60.0 if options.full else 10.0)
    training = start(recipe, options.out, options.fresh, pause)
    console.print(
        f"words: {len(splits.train):,} to train on, {len(splits.dev):,} development, {len(splits.test):,} held out; "
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters; {threads()}"
    )
    if not (ended := fit(training, options.out, console)):
        console.print(
            f"interrupted: the best model so far is scored; the same command goes on behind step {training.steps:,}"
        )
    model = load(options.out / MODEL)
    trained = f"trained {training.steps:,} steps in {training.seconds():.0f} s"
    console.print(f"{trained}; development set: {evaluate(model, splits.dev)}")
    test = evaluate(model, splits.test, options.beams)
    console.print(f"held-out words: {test}")
    note(training, options.out, test={options.beams: test._asdict()})
    console.print(f"training speed: {speed.compare(model, recipe)}")
    show_new(model, splits, options, console)
    console.print(f"model: {options.out / MODEL}   attention: {options.out / PICTURE}")
    if ended:
        resume.remove(options.out / STATE)
    return 0


def say(options: argparse.Namespace) -> int:
    model = load(options.checkpoint)
    letters, words = model.extra["letters"], []
    for word in options.words:
        if (form := in_case(word, letters)) is None:
            raise DataError(f"{word!r} has letters that the model never saw; it knows {''.join(letters)}")
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
