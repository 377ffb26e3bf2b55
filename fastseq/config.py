"""Modules as plain data: the arguments that build each of them again, and nothing else.

A part's `config()` is {argument of its constructor: value}, where a value is None, a bool, int, float, str, a list of
those, or for a part {"kind": name of its class, ...its config}. What no such data describes is refused.
"""

import collections.abc
import numbers
import types
import typing
import warnings
from reprlib import repr as short
from typing import Any, TypeVar

import torch
from torch import nn

from .errors import InputError, with_article

__all__ = ["REMEDY", "arguments", "build", "config_of", "described", "part"]

REMEDY = "save its parameters yourself: torch.save(model.state_dict(), path), or safetensors.torch.save_model"

KINDS: dict[str, type] = {"Embedding": nn.Embedding, "Linear": nn.Linear}  # all that `build` can make; `part` adds ours

Part = TypeVar("Part", bound=type)


def part(cls: Part) -> Part:
    """Class decorator: config data may name the class as a kind. It has `config`."""
    KINDS[cls.__name__] = cls
    return cls


def arguments(cls: type) -> dict[str, Any]:
    """{argument: type} of the constructor, but for device and dtype, which are the parameters' own.

    A class whose constructor hands on whatever it is given, as torch.nn's layers do, has them as ARGUMENTS.
    """
    hints = getattr(cls, "ARGUMENTS", None) or typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    return {name: hint for name, hint in hints.items() if name not in ("device", "dtype", "return") and name[0] != "_"}


def described(module: object, **values: Any) -> dict[str, Any]:
    """A config: each argument's value is that of `values`, otherwise the attribute of its name."""
    cls = type(module)
    return {
        name: _plain(f"{cls.__name__}.{name}", values[name] if name in values else getattr(module, name))
        for name in arguments(cls)
    }


def config_of(name: str, value: Any) -> dict[str, Any]:
    """{"kind": ..., ...config} of a part; TypeError naming it where its class is no kind."""
    cls: Any = type(value)
    kind = cls.__name__
    if KINDS.get(kind) is not cls:
        raise TypeError(f"{name} is of class {kind}, which plain data cannot describe; {REMEDY}")
    if isinstance(value, nn.Linear):
        return {"kind": kind, **described(value, bias=value.bias is not None)}
    return {"kind": kind, **(described(value) if isinstance(value, nn.Embedding) else value.config())}


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    return config_of(name, value)


def build(config: Any, name: str = "config") -> Any:
    """The part that a config with its kind describes, on the meta device: no memory is taken, whatever its sizes.

    Raises InputError, naming the field, for any other data. Only classes that are kinds are ever called.
    """
    kind = config.get("kind") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{name}.kind={short(kind)}; use one of {', '.join(KINDS)}")
    hints = arguments(KINDS[kind])
    for field in {**hints, **config}:
        if field != "kind" and (field not in hints or field not in config):
            fault = "missing" if field in hints else "unknown"
            raise InputError(f"{name}.{field} is {fault}; {kind} has {', '.join(hints)}")
    values = {}
    for field, hint in hints.items():
        value, where = config[field], f"{name}.{field}"
        values[field] = build(value, where) if isinstance(value, dict) else value
        if not _fits(values[field], hint):
            expected = hint.__name__ if isinstance(hint, type) else hint
            raise InputError(
                f"{where}={short(value)} is {with_article(type(values[field]).__name__)}; expected {expected}"
            )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its user has seen what the constructor warns of
            return KINDS[kind](**values)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise InputError(f"{name}: {kind} cannot be built of it: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of plain data, or a part, is of an annotated type. No plain data is a function."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (tuple, collections.abc.Sequence):
        return type(value) is list and all(_fits(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (bool, int, str):  # a bool is no int here
        return type(value) is hint
    return isinstance(hint, type) and isinstance(value, hint)
