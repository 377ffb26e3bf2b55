"""Dataclasses from parsed JSON: every field there, none unknown, each of its type, or a ValueError that says where."""

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["Readers", "read"]

T = TypeVar("T")
Readers = dict[type, Callable[[Any], Any]]  # of types that read themselves; they raise ValueError


def read(kind: type[T], value: Any, where: str = "$", readers: Readers | None = None) -> T:
    """`value` as a `kind`: a dataclass, str, bool, int, float, and lists, tuples, dicts and unions of these.

    where: the path of `value` in its file, for messages. An int stands for a float; a list for a tuple.
    """
    found: T = _read(kind, value, where, readers or {})
    return found


def _read(kind: Any, value: Any, where: str, readers: Readers) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind in readers:
        try:
            return readers[kind](value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where, readers)
    if is_dataclass(kind):
        return _dataclass(kind, value, where, readers)
    if origin in (list, tuple):
        _need(list, value, where)
        return origin(_read(inner[0], v, f"{where}[{k}]", readers) for k, v in enumerate(value))
    if origin is dict:
        _need(dict, value, where)
        return {name: _read(inner[1], v, f"{where}.{name}", readers) for name, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind and kind is not Any:
        raise ValueError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _dataclass(kind: Any, value: Any, where: str, readers: Readers) -> Any:
    _need(dict, value, where)
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    unknown = value.keys() - known.keys()
    missing = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING} - value.keys()
    if unknown or missing:
        what = f"unknown fields {sorted(unknown)}" if unknown else f"missing fields {sorted(missing)}"
        raise ValueError(f"{where}: {what} of a {kind.__name__}")
    return kind(**{name: _read(hints[name], v, f"{where}.{name}", readers) for name, v in value.items()})


def _one_of(kinds: tuple[Any, ...], value: Any, where: str, readers: Readers) -> Any:
    said = []
    for kind in kinds:
        if kind is type(None):
            if value is None:
                return None
            continue
        try:
            return _read(kind, value, where, readers)
        except ValueError as error:
            said.append(str(error))
    raise ValueError(said[-1])


def _need(kind: type, value: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {value!r} is no {'object' if kind is dict else kind.__name__}")
