"""A toolkit's state_dict, read key by key: what is missing, of another shape or left over is an error that names it."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, with_article

__all__ = ["KINDS", "Options", "Stack", "Weights", "equal", "read_stack"]

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
CELLS = {4: "lstm", 3: "gru"}  # by the gates of torch's cells
MOST_NAMED = 8  # keys in one message
WHOLE = ("opt", "model", "args", "cfg")  # what a whole checkpoint or configuration has its options in


class Weights:
    """A state_dict of which every key has to be taken. toolkit: for messages. entry: where a checkpoint has it.

    Raises TypeError for a path or another object, InputError for a whole checkpoint.
    """

    def __init__(self, toolkit: str, given: Any, entry: str) -> None:
        self.toolkit = toolkit
        self.dtype: torch.dtype | None = None  # of the first
        if not isinstance(given, Mapping):
            hint = f'torch.load(path, map_location="cpu")["{entry}"]'
            raise TypeError(f"state_dict of {toolkit} must be a mapping, got {type(given).__name__}; pass {hint}")
        if isinstance(given.get(entry), Mapping):
            raise InputError(f"state_dict is a whole checkpoint of {toolkit}; pass checkpoint[{entry!r}]")
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name!r} of {toolkit}'s state_dict is {with_article(type(value).__name__)}, not a tensor"
                )
        self._left: dict[str, Tensor] = dict(given)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def refuse(self, unsupported: Mapping[str, str]) -> None:
        """InputError for the first key that starts with one of these prefixes, naming what it stands for."""
        for prefix, what in unsupported.items():
            for name in self._left:
                if name.startswith(prefix):
                    raise InputError(f"{self.toolkit}'s {what} ({name!r}) is not supported")

    def peek(self, name: str) -> Tensor:
        """The tensor of this key, which stays to be taken."""
        if name not in self._left:
            raise InputError(f"{self.toolkit}'s state_dict has no {name!r}; what is left of it: {_named(self._left)}")
        return self._left[name]

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of this key, of this shape; None: any size. It counts as used."""
        found = self.peek(name)
        del self._left[name]
        fits = len(shape) == found.dim() and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if not fits:
            expected = ", ".join("any" if n is None else str(n) for n in shape) + "," * (len(shape) == 1)
            raise InputError(f"{name!r} of {self.toolkit} has shape {tuple(found.shape)}; expected ({expected})")
        if not found.is_floating_point():
            raise InputError(f"{name!r} of {self.toolkit} is {found.dtype}; expected floating point, not quantized")
        self.dtype = self.dtype or found.dtype
        if found.dtype != self.dtype:
            raise InputError(
                f"{name!r} of {self.toolkit} is {found.dtype}, others are {self.dtype}; convert them to one dtype"
            )
        return found.detach()

    def layers(self, form: str) -> int:
        """How many layers have a key of this form, of `kind` and `layer`."""
        count = 0
        while any(form.format(kind=kind, layer=count) in self._left for kind in KINDS):
            count += 1
        return count

    def finish(self) -> None:
        """InputError naming the keys that nothing has taken."""
        if self._left:
            raise InputError(
                f"{len(self._left)} key(s) of {self.toolkit}'s state_dict mean nothing here: {_named(self._left)}"
            )


class Stack(NamedTuple):
    """Recurrent layers of torch's parameters."""

    cell: str
    hidden_size: int
    num_layers: int
    dirs: int
    tensors: dict[str, Tensor]  # by their names in fastseq


def read_stack(weights: Weights, form: str, input_size: int, name: str, feed: bool = False) -> Stack:
    """The layers of keys `form`, which are `name` in fastseq; both of `kind` and `layer`, the reverse ones of an end.

    feed: the first layer reads `hidden_size` features more.
    """
    layers = weights.layers(form)
    top = weights.take(form.format(kind="weight_hh", layer=0), None, None)
    rows, hidden = top.shape
    if hidden == 0 or rows % hidden or rows // hidden not in CELLS:
        where = f"{form.format(kind='weight_hh', layer=0)!r} of {weights.toolkit} has shape {tuple(top.shape)}"
        raise InputError(f"{where}: an LSTM's is (4 H, H), a GRU's (3 H, H); other cells are not supported")
    ends = ["", "_reverse"] if form.format(kind="weight_hh", layer=0) + "_reverse" in weights else [""]
    tensors = {name.format(kind="weight_hh", layer=0): top}
    for layer in range(layers):
        reads = input_size + feed * hidden if layer == 0 else hidden * len(ends)
        shapes = {"weight_ih": (rows, reads), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
        for end in ends:
            for kind, shape in shapes.items():
                ours = name.format(kind=kind, layer=layer) + end
                if ours not in tensors:
                    tensors[ours] = weights.take(form.format(kind=kind, layer=layer) + end, *shape)
    return Stack(CELLS[rows // hidden], hidden, layers, len(ends), tensors)


class Options:
    """A toolkit's own options, a mapping (of mappings) or a namespace, as far as keys do not show them."""

    def __init__(self, toolkit: str, opt: Any) -> None:
        self.toolkit = toolkit
        if opt is not None and not isinstance(opt, Mapping) and not hasattr(opt, "__dict__"):
            raise TypeError(f"opt must be a mapping or a namespace of {toolkit}'s options, got {type(opt).__name__}")
        self._opt: Mapping[str, Any] = {} if opt is None else opt if isinstance(opt, Mapping) else vars(opt)
        for whole in WHOLE:
            if isinstance(self._opt.get(whole), (Mapping, SimpleNamespace, Namespace)):
                raise InputError(f"opt of {toolkit} has options within {whole!r}; pass opt[{whole!r}]")

    def get(self, path: str, default: Any = None) -> Any:
        """The value of an option, "a.b" as opt["a"]["b"] or opt["b"]; else the default."""
        found: Any = self._opt
        for name in path.split("."):
            if not isinstance(found, Mapping) or name not in found:
                return self._opt.get(path.rsplit(".", 1)[-1], default)
            found = found[name]
        return found

    def agree(self, shown: Mapping[str, Any]) -> None:
        """InputError for an option that is given and says otherwise than the keys show."""
        for path, value in shown.items():
            found = self.get(path)
            if found is not None and found != value:
                raise InputError(
                    f"{path}={found!r} of {self.toolkit}, but the keys show {value!r}: a key is missing, or the "
                    "options are another model's"
                )

    def refuse_others(self, supported: Mapping[str, Iterable[Any]]) -> None:
        """InputError for an option that is given and none of the values that are supported."""
        for path, values in supported.items():
            found = self.get(path)
            if found is not None and found not in values:
                allowed = " or ".join(repr(value) for value in values)
                raise InputError(f"{path}={found!r} of {self.toolkit} is not supported; {allowed} is")


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same values: then the toolkit had them tied."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _named(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMED else ""
    return ", ".join(map(repr, names[:MOST_NAMED])) + more if names else "no key"
