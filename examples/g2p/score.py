"""Word and phoneme error rate, as the papers count them."""

from collections.abc import Sequence
from typing import NamedTuple

from .data import Lexicon


class Scores(NamedTuple):
    wer: float  # share of words that equal none of their pronunciations
    per: float  # edits to the closest pronunciation, over its phonemes
    words: int

    @property
    def cost(self) -> float:
        return self.wer

    @property
    def brief(self) -> str:
        return f"WER {self.wer:.1%}"

    def __str__(self) -> str:
        return f"word error rate {self.wer:.2%}, phoneme error rate {self.per:.2%} ({self.words:,} words)"


def score(said: dict[str, Sequence[str]], lexicon: Lexicon) -> Scores:
    """What was said for each word of a lexicon, against all its pronunciations."""
    wrong = edits = phonemes = 0
    for word, references in lexicon.items():
        distance, length = min((edit_distance(said[word], r), len(r)) for r in references)
        wrong += distance > 0
        edits += distance
        phonemes += length
    return Scores(wrong / max(1, len(lexicon)), edits / max(1, phonemes), len(lexicon))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make b of a (Levenshtein 1966)."""
    if tuple(a) == tuple(b):
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
