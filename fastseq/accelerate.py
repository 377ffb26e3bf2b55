"""Turn a model's torch.nn recurrent modules, and toolkits' decoders, into fastseq's, in place."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .errors import InputError, with_article
from .interop.adapters import Adapter
from .interop.registry import adapter_of, known, why_not
from .modules.dropin import DROP_INS, own_forward
from .modules.encoder import Encoder
from .modules.frozen import KEY
from .modules.modes import beyond_torch

__all__ = ["Change", "Report", "accelerate"]

_FAST = {stock: pair.fast for stock, pair in DROP_INS.items()}
_STOCK = {fast: stock for stock, fast in _FAST.items()}
_NAMES = {kind.__name__ for kind in _FAST}
_MARK = "_fastseq_accelerated"  # in the instances that accelerate changed, so that undo leaves others alone


class Change(NamedTuple):
    """What became of one recurrent module."""

    name: str  # as in model.named_modules(); "" is the model itself
    action: str  # "accelerated" | "reverted" | "skipped"
    reason: str


class Report(list[Change]):
    """One Change for each recurrent module of the model; str() is a table."""

    nothing = "nothing here that fastseq replaces: no torch.nn.LSTM, GRU, RNN or cell of these, no toolkit's decoder"

    def __str__(self) -> str:
        if not self:
            return self.nothing
        width = max((len(c.name) for c in self), default=0)
        return "\n".join(f"{c.action:<11} {c.name or '(model)':<{max(width, 7)}} {c.reason}" for c in self)


def accelerate(model: nn.Module, undo: bool | str = False) -> Report:
    """Make every torch.nn.LSTM, GRU, RNN and their cells within `model` a fastseq one, in place; undo=True reverts it.

    Only the class of the instances changes: parameters, parametrizations, buffers, hooks and training mode stay as they
    are, and a module shared by several parents is changed for all. Subclasses are left alone (their code may rely on
    torch's forward; `fastseq.patch()` serves those that come to it), and so are an instance with a forward of its own
    and what another tool has compiled, sharded or quantized: the report says why.

    Also JoeyNMT's RecurrentEncoder and RecurrentDecoder, OpenNMT-py's InputFeedRNNDecoder and fairseq's LSTMDecoder,
    whose steps then run as one operator: signatures, state_dict and isinstance stay, and on the CPU random draws do.

    undo="all" also makes torch's own of the modules that were built as fastseq's, for tools that ask for the exact
    type, such as torch.ao.quantization. Torch's take no lengths= and no resets=; layers of a fastseq.Encoder stay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if undo not in (False, True, "all"):
        raise InputError(f"undo={undo!r}; use True for what accelerate did, 'all' for every fastseq module, or False")
    parts = {id(layer) for part in model.modules() if isinstance(part, Encoder) for layer in part.layers}
    found = (
        _revert(name, module, undo == "all", id(module) in parts) if undo else _swap(name, module)
        for name, module in model.named_modules()
    )
    report = Report(c for c in found if c is not None)
    if undo:
        report.nothing = "nothing here to revert: no module is fastseq's"
    return report


def _swap(name: str, module: nn.Module) -> Change | None:
    kind = _kind(module)
    if kind in _FAST and "forward" in vars(module):
        told = "has a forward set on the instance, which goes before any class's; accelerate before it is set"
        return Change(name, "skipped", told)
    if kind in _FAST:
        _become(module, _FAST[kind])
        setattr(module, _MARK, True)
        return Change(name, "accelerated", f"torch.nn.{kind.__name__} is now fastseq.{kind.__name__}")
    if kind in _STOCK:
        return Change(name, "skipped", f"is a fastseq.{kind.__name__} already")
    if isinstance(module, tuple(_STOCK)):
        return Change(name, "skipped", f"{kind.__name__} is a subclass of a fastseq module already")
    if isinstance(module, tuple(_FAST)):
        return Change(name, "skipped", _why_not(module))
    return _made_elsewhere(name, module) or _adapt(name, module)


def _why_not(module: nn.Module) -> str:
    """Of an instance of a subclass of torch's."""
    kind = type(module)
    if any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__):
        return f"{kind.__name__} is sharded; accelerate before fully_shard"
    if "forward" in vars(module):
        return f"{_full(kind)} is a subclass, and has a forward set on the instance, which patch() does not reach"
    own = own_forward(module)
    if own is None:
        return f"{_full(kind)} is a subclass; use fastseq.patch()"
    if own[1]:
        return f"{_full(kind)} is a subclass whose forward calls super().forward(); use fastseq.patch()"
    return (
        f"{_full(kind)} is a subclass with a forward of its own, which calls no super().forward(): nothing to replace"
    )


def _made_elsewhere(name: str, module: nn.Module) -> Change | None:
    """What another tool of torch made of a recurrent module."""
    kind = type(module)
    of = getattr(module, "original_name", kind.__name__)  # torch.jit's modules keep the name of what they were made of
    if of not in _NAMES:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return Change(
            name, "skipped", f"{with_article(of)} that torch.jit compiled; accelerate the Python model it was made of"
        )
    if kind.__module__.startswith("torch.ao."):
        told = f"is {kind.__module__}.{of}, made to be quantized, which fastseq's kernels do not run"
        remedy = "accelerated before, the layer stays in floating point"
        return Change(name, "skipped", f"{told}; {remedy}")
    if kind.__module__.startswith("torch."):
        return Change(name, "skipped", f"is {kind.__module__}.{of}, not torch.nn.{of}; accelerate the model before")
    return None


def _adapt(name: str, module: nn.Module) -> Change | None:
    """A toolkit's encoder or decoder."""
    kind = type(module)
    if isinstance(module, Adapter):
        return Change(name, "skipped", f"{_full(module.stock)} is accelerated already")
    part = known(kind)
    if part is None:
        base = next((base for base in kind.__mro__ if known(base) is not None), None)
        return None if base is None else Change(name, "skipped", f"{_full(kind)} is a subclass of {_full(base)}")
    why = why_not(part, module)
    if why is not None:
        return Change(name, "skipped", f"{_full(kind)}: {why}")
    module.__class__ = adapter_of(kind)
    setattr(module, _MARK, True)
    return Change(name, "accelerated", f"{_full(kind)} runs its steps as one operator")


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _revert(name: str, module: nn.Module, every: bool, within: bool) -> Change | None:
    if isinstance(module, Adapter):
        module.__dict__.pop(_MARK, None)
        stock: type[nn.Module] = type(module).stock
        module.__class__ = stock  # type: ignore[assignment]
        return Change(name, "reverted", f"{_full(stock)} is itself again")
    kind = _kind(module)
    if kind not in _STOCK:
        return None
    built = _MARK not in module.__dict__
    if built and not every:
        return Change(name, "skipped", f"was built as fastseq.{kind.__name__}; undo='all' reverts these too")
    if within:
        return Change(name, "skipped", "belongs to a fastseq.Encoder, which calls it with lengths=")
    more = beyond_torch(module)
    if more is not None:
        return Change(name, "skipped", f"torch.nn.{_STOCK[kind].__name__} has no {more}")
    module.__dict__.pop(_MARK, None)
    module.__dict__.pop(KEY, None)
    _become(module, _STOCK[kind])
    return Change(name, "reverted", f"fastseq.{kind.__name__} is torch.nn.{kind.__name__}{'' if built else ' again'}")


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, of a parametrized one before torch gave it one of its own."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give `module` the class `kind`."""
    own = type(module)
    if own is not _kind(module):  # torch's class of this one module holds the properties that compute its weights
        inner = {key: value for key, value in own.__dict__.items() if key not in ("__dict__", "__weakref__", "__doc__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), inner)
    module.__class__ = kind
