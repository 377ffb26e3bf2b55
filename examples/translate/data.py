"""Multi30k's files, German to English: read, lower-cased and tokenised, encoded.

Tokens are Moses' (Koehn et al. 2007, by sacremoses), its punctuation normalised, hyphens between letters tokens of
their own (@-@), as in the data set's own tokenised text. A vocabulary has the words that occur at least `least` times
in the training text; others are <unk>, one id.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..training.batches import BOS, EOS, Pairs, pad
from ..training.files import DataError, lines

LANGUAGES = ("de", "en")  # source, target
PARTS = ("train", "val", "test_2016_flickr")
UNKNOWN, SPECIAL = 3, 4  # ids: PAD, BOS, EOS, UNKNOWN, then words
WHERE = "https://github.com/multi30k/dataset, folder data/task1/raw"
WANTED = ", ".join(f"{part}.{{de,en}}.gz" for part in PARTS)

Sentence = list[str]


class Text(NamedTuple):
    """Sentence i of the target translates that of the source."""

    source: list[Sentence]
    target: list[Sentence]


class Splits(NamedTuple):
    train: Text
    dev: Text  # every choice is made on it
    test: Text  # scored once


def load(folder: Path | None) -> Splits:
    """Multi30k of a folder; DataError, naming file and line, if it is not there or not as it should be."""
    if folder is None:
        raise DataError(f"no data: --data DIR, a folder with {WANTED}; from {WHERE}")
    return Splits(*(read(folder, part) for part in PARTS))


def read(folder: Path, part: str) -> Text:
    """Both sides of one part, line by line."""
    paths = [folder / f"{part}.{language}.gz" for language in LANGUAGES]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; wanted {WANTED}, from {WHERE}")
    text = Text([], [])
    for rows in zip_longest(*map(lines, paths)):
        for path, other, row in zip(paths, reversed(paths), rows, strict=True):
            if row is None:
                number = len(text.source) + 1
                raise DataError(f"{path}:{number}: missing, {other} has a line {number}: lines must be translations")
            if not row[1].strip():
                raise DataError(f"{path}:{row[0]}: the line is empty")
        for side, language, (_, line) in zip(text, LANGUAGES, rows, strict=True):
            side.append(tokenize(line, language))
    return text


def tokenize(text: str, language: str) -> Sentence:
    """Lower-cased tokens of one sentence."""
    normalize, split, _ = moses(language)
    return split(normalize(text.lower()))


def detokenize(tokens: Iterable[str]) -> str:
    """English text of tokens."""
    return moses("en")[2](tokens)


@lru_cache
def moses(language: str) -> tuple[Callable[[str], str], Callable[[str], Sentence], Callable[[Iterable[str]], str]]:
    """Normalise, tokenise, put together again."""
    try:
        import sacremoses
    except ImportError:
        raise DataError("the package sacremoses is missing: pip install sacremoses") from None
    normalizer, splitter = sacremoses.MosesPunctNormalizer(language), sacremoses.MosesTokenizer(language)
    joiner = sacremoses.MosesDetokenizer(language)

    def split(text: str) -> Sentence:
        return splitter.tokenize(text, aggressive_dash_splits=True, escape=False)

    return normalizer.normalize, split, joiner.detokenize


def digest(splits: Splits) -> str:
    """Of all sentences, in their order."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]


def vocabulary(sentences: Iterable[Sentence], least: int) -> list[str]:
    """The words that occur at least `least` times, the most frequent first: the id of word n is n + SPECIAL."""
    counts = Counter(word for sentence in sentences for word in sentence)
    return [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= least]


def read_ids(sentences: Sequence[Sentence], words: Sequence[str], backwards: bool) -> tuple[Tensor, Tensor]:
    """(source [N, S], lengths [N]); backwards: the last word first (Sutskever et al. 2014, 3.3)."""
    index = {word: i for i, word in enumerate(words, SPECIAL)}
    rows = [[index.get(word, UNKNOWN) for word in sentence] for sentence in sentences]
    return pad([row[::-1] for row in rows] if backwards else rows)


def encode(text: Text, source_words: Sequence[str], target_words: Sequence[str], backwards: bool) -> Pairs:
    """Sentences as ids."""
    index = {word: i for i, word in enumerate(target_words, SPECIAL)}
    target = [[BOS, *(index.get(word, UNKNOWN) for word in sentence), EOS] for sentence in text.target]
    return Pairs(*read_ids(text.source, source_words, backwards), *pad(target))
