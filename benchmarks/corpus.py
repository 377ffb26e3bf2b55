"""Lengths of real batches: Multi30k, German to English, as a trainer batches it. No text is kept, only lengths.

Sentences are lower-cased; a token is a run of word characters or one punctuation mark. The training pairs are shuffled
(seed 0), cut into pools of 100 batches, each pool sorted by source, then target length and cut into batches of 64. A
target has one step more than tokens, the end of the sentence.

    python -m benchmarks.corpus DIR    # writes the sample anew from DIR/train.{de,en}.gz
"""

import gzip
import json
import random
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

__all__ = ["ROWS", "SOURCES", "derive", "evenly"]

ROWS = 64  # sentences of a batch
POOL, SEED = 100, 0
SAMPLE = Path(__file__).parent / "data" / "multi30k_lengths.json"
SAMPLED = 8  # batches, 4 KB
TOKEN = re.compile(r"\w+|[^\w\s]")

Batch = tuple[list[int], list[int]]  # source positions, target steps
Item = TypeVar("Item")


def derive(folder: Path) -> list[Batch]:
    """All batches of the training pairs, by padded size."""
    sides = [[len(TOKEN.findall(line)) for line in _lines(folder / f"train.{end}.gz")] for end in ("de", "en")]
    pairs = [(source, target + 1) for source, target in zip(*sides, strict=True)]
    random.Random(SEED).shuffle(pairs)
    batches = []
    for begin in range(0, len(pairs), POOL * ROWS):
        pool = sorted(pairs[begin : begin + POOL * ROWS])
        whole = range(0, len(pool) - ROWS + 1, ROWS)  # a last batch of fewer rows is dropped
        batches += [([s for s, _ in pool[k : k + ROWS]], [t for _, t in pool[k : k + ROWS]]) for k in whole]
    return sorted(batches, key=lambda batch: max(batch[0]) * max(batch[1]))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of them, evenly spaced: the middles of as many equal parts."""
    return [items[(2 * k + 1) * len(items) // (2 * count)] for k in range(count)]


def _lines(file: Path) -> list[str]:
    return gzip.open(file, "rt", encoding="utf-8").read().lower().splitlines()


@lru_cache(maxsize=1)
def _sample() -> list[Batch]:
    return [(batch["source"], batch["target"]) for batch in json.loads(SAMPLE.read_text())]


SOURCES = {"multi30k": _sample}


def _write_sample(folder: Path) -> None:
    lines = [json.dumps({"source": s, "target": t}) for s, t in evenly(derive(folder), SAMPLED)]
    SAMPLE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    _write_sample(Path(sys.argv[1]))
