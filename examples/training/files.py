"""Text files, plain or gzipped, line by line; a fault is said with file and line."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path


class DataError(ValueError):
    """A file that is not what it should be; the message names file and line."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, from 1, text without its end) of each line of a UTF-8 file, of at least one; DataError, or OSError."""
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, decoded(path, number, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: cut or damaged: {error}") from None
    if not number:
        raise DataError(f"{path}:1: the file is empty")


def decoded(path: Path | str, number: int, raw: bytes) -> str:
    """The text of a line, without its end."""
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.start + 1})") from None
