"""Stanza's part-of-speech tagger, trained by its own command: characters and words by bidirectional packed LSTMs."""

import logging
import random
from pathlib import Path
from tempfile import TemporaryDirectory

from stanza.models import tagger

from .program import Convert, Learned, Program

SENTENCES, STEPS, BATCH = 120, 8, 16
SUFFIXES = {"NOUN": ("a", "on", "eta"), "VERB": ("is", "ir", "emos"), "ADJ": ("ul", "ox"), "ADV": ("ment",)}


class _Losses(logging.Handler):
    """Those that the trainer logs, one a step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Finished STEP"):
            self.values.append(float(text.split("loss = ")[1].split()[0]))


def build(convert: Convert) -> tuple[TemporaryDirectory, list[str]]:
    """A folder with sentences of an invented language, whose endings tell the tags; the arguments of the command."""
    temporary = TemporaryDirectory()
    folder = Path(temporary.name)
    draw = random.Random(0)
    for name, count in (("train", SENTENCES), ("dev", 10)):
        (folder / f"{name}.conllu").write_text("\n\n".join(_sentence(draw) for _ in range(count)) + "\n\n")
    arguments = ["--train_file", str(folder / "train.conllu"), "--eval_file", str(folder / "dev.conllu")]
    arguments += ["--save_dir", str(folder), "--lang", "xx", "--shorthand", "xx_invented", "--no_pretrain", "--cpu"]
    arguments += ["--max_steps", str(STEPS), "--eval_interval", str(STEPS), "--fix_eval_interval"]
    arguments += ["--batch_size", str(BATCH), "--log_step", "1"]
    return temporary, arguments


def _sentence(draw: random.Random) -> str:
    tags = draw.choices(list(SUFFIXES), k=draw.randint(5, 30))
    return "\n".join(
        f"{i}\t{_stem(draw)}{draw.choice(SUFFIXES[tag])}\t_\t{tag}\t{tag[0]}\t_\t{i - 1}\tdep\t_\t_"
        for i, tag in enumerate(tags, 1)
    )


def _stem(draw: random.Random) -> str:
    return "".join(draw.choice("bcdfgmnprst") + draw.choice("aeiou") for _ in range(draw.randint(1, 4)))


def run(built: tuple[TemporaryDirectory, list[str]]) -> Learned:
    _, arguments = built
    logger, losses = logging.getLogger("stanza"), _Losses()
    logger.addHandler(losses)
    logger.setLevel(logging.INFO)
    trainer, _ = tagger.main(arguments)
    logger.removeHandler(losses)
    return Learned(losses.values, [p.detach() for p in trainer.model.parameters()])


PROGRAM = Program(
    "stanza",
    f"part-of-speech tagger: characters I=100, H=400, words H=200, 2 layers, bidirectional, packed with hx; "
    f"{STEPS} updates of {BATCH} sentences",
    "patch",
    build,
    run,
)
