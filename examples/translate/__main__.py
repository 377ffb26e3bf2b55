"""python -m examples.translate train | say SENTENCE... | curve RUN..."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import fastseq

from ..training import resume
from ..training.command import (
    MODEL,
    STATE,
    add_options,
    count,
    fit,
    note,
    planned,
    positive,
    probability,
    run,
    start,
    threads,
)
from ..training.files import decoded
from . import curve, data
from .model import PAPERS, load, translate
from .recipe import PLANS, Recipe
from .score import bleu

OUT = Path("build/translate")
SHOWN = 3  # sentences
PAUSE = 60.0  # seconds: a state of 120 MB takes most of one


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    return run(parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m examples.translate", description="Learn to translate captions.")
    commands = top.add_subparsers(required=True, metavar="train|say|curve")
    train_ = commands.add_parser("train", help="train, score, and leave a model; go on if that was cut short")
    train_.add_argument("--data", type=Path, metavar="DIR", help="Multi30k's files")
    train_.add_argument("--model", choices=PAPERS, default="bahdanau", dest="paper", help="(default %(default)s)")
    sizes = ("embedding", "hidden")
    add_options(
        train_,
        PLANS["bahdanau"],
        f"{PAUSE:.0f}",
        **{name: {"type": count, "help": "units"} for name in sizes},
        layers={"type": count, "help": f"of either side; of sutskever {PLANS['sutskever'].layers}"},
        dropout={"type": probability, "help": "probability"},
        rate={"type": positive, "help": "of learning, at its peak"},
        least={"type": count, "help": "occurrences of a word in the vocabulary"},
    )
    train_.add_argument("--out", type=Path, metavar="DIR", help=f"results (default {OUT}/MODEL-LIBRARY)")
    train_.set_defaults(run=train)
    say_ = commands.add_parser("say", help="translate sentences with a trained model")
    say_.add_argument("sentences", nargs="*", metavar="SENTENCE", help="default: the lines of standard input")
    say_.add_argument("--checkpoint", type=Path, metavar="FILE", help=f"default: the newest {OUT}/*/{MODEL}")
    say_.set_defaults(run=say)
    for command in (train_, say_):
        command.add_argument("--beams", type=count, default=5, help="of the search, when done (default %(default)s)")
    curve_ = commands.add_parser("curve", help="draw the development set's BLEU over time of several runs")
    curve_.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `train` left")
    curve_.add_argument("--out", type=Path, default=OUT / "curve.png", metavar="FILE", help="(default %(default)s)")
    curve_.set_defaults(run=draw)
    return top


def train(options: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    plan = planned(options, PLANS[options.paper])
    out = options.out or OUT / f"{plan.paper}-{plan.library}"
    recipe = Recipe(data.load(options.data), plan)
    out.mkdir(parents=True, exist_ok=True)
    training = start(recipe, out, options.fresh, options.save_every or PAUSE)
    console.print(
        f"pairs: {len(recipe.pairs.source):,} to train on, {len(recipe.dev.source):,} development, "
        f"{len(recipe.splits.test.source):,} test; words: {' and '.join(f'{len(w):,}' for w in recipe.words_of)}; "
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters; {threads()}"
    )
    if not fit(training, out, console):
        console.print(
            f"interrupted: {out / MODEL} is the best model so far; the same command goes on behind step"
            f" {training.steps:,}"
        )
        return 130
    model = load(out / MODEL)
    console.print(
        f"trained {training.steps:,} steps in {training.seconds():.0f} s; development set: best BLEU", end=" "
    )
    console.print(f"{-training.lowest:.2f}, greedy")
    test = {beams: score(model, recipe.splits.test, beams) for beams in sorted({1, options.beams})}
    console.print("test_2016_flickr: BLEU " + ", ".join(f"{found:.2f} by {n} beam(s)" for n, found in test.items()))
    show(model, recipe.splits.dev, options.beams, console)
    note(training, out, test=test)
    console.print(f"model: {out / MODEL}")
    resume.remove(out / STATE)
    return 0


def score(model: fastseq.Seq2Seq, text: data.Text, beams: int) -> float:
    return bleu(translate(model, text.source, beams), text.target)


def show(model: fastseq.Seq2Seq, text: data.Text, beams: int, console: Console) -> None:
    """The first sentences of a text, what the model makes of them, and the reference."""
    found = translate(model, text.source[:SHOWN], beams)
    for source, said, target in zip(text.source, found, text.target, strict=False):
        for name, tokens in (("source", source), ("model", said), ("reference", target)):
            console.print(f"  {name:9}  {' '.join(tokens)}", markup=False)


def say(options: argparse.Namespace) -> int:
    model = load(options.checkpoint or newest())
    sentences: Any = options.sentences or lines_of_input()
    tokens = [data.tokenize(sentence, data.LANGUAGES[0]) for sentence in sentences]
    found = iter(translate(model, [t for t in tokens if t], options.beams))
    for each in tokens:
        print(data.detokenize(next(found)) if each else "")
    return 0


def newest() -> Path:
    """The model trained last; where there is none, where one would be."""
    found = sorted(OUT.glob(f"*/{MODEL}"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else OUT / "bahdanau-fastseq" / MODEL


def lines_of_input() -> list[str]:
    return [decoded("standard input", n, raw) for n, raw in enumerate(sys.stdin.buffer, 1)]


def draw(options: argparse.Namespace) -> int:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    curve.draw(options.runs, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
