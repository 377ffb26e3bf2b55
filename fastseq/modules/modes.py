"""What other tools of torch ask of a recurrent module: torch.jit.script, torch.ao.quantization and torch.nn.utils."""

import inspect
import warnings
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .frozen import KEY
from .recurrent import Recurrent

__all__ = ["beyond_torch", "not_scriptable", "serves_modes", "stock_class", "stock_twin"]

M = TypeVar("M", bound=nn.Module)

_OURS = ("backend", "qconfig", "_fastseq_accelerated", KEY)  # in an instance, and no business of torch's classes


def serves_modes(cls: type[M]) -> type[M]:
    """Decorate a subclass of a recurrent class of torch.nn."""
    cls.__prepare_scriptable__ = stock_twin  # type: ignore[attr-defined]
    cls.qconfig = _Unquantized()  # type: ignore[attr-defined]
    cls.__init__.__signature__ = _signature(cls)  # type: ignore[attr-defined]
    return cls


def stock_class(cls: type[nn.Module]) -> type[nn.Module]:
    """torch's own class that `cls` is or extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))


def beyond_torch(module: nn.Module) -> str | None:
    """The options of `module` that torch's class has not; None where it computes the same."""
    if not isinstance(module, Recurrent):
        return None
    options = ("zoneout", "recurrent_dropout", "learn_state", "layer_norm")
    given = [f"{name}={getattr(module, name)}" for name in options if getattr(module, name)]
    return ", ".join(given) or None


def stock_twin(module: nn.Module) -> nn.Module:
    """A module of torch's own class on the parameters of `module`; torch.jit.script puts it into that one's place.

    torch.jit.script does so within the Python model as well, which `fastseq.accelerate` then makes fast again.
    Raises InputError for what torch's class would compute otherwise.
    """
    cls, stock = type(module), stock_class(type(module))
    if parametrize.is_parametrized(module):
        raise InputError(
            f"torch.jit.script takes no parametrized {stock.__name__}; call "
            "torch.nn.utils.parametrize.remove_parametrizations first, or use torch.compile or torch.export"
        )
    base: Any = next(b for b in cls.__mro__ if "__prepare_scriptable__" in b.__dict__)
    if cls.forward is not base.forward:
        raise InputError(
            f"{cls.__name__} has a forward of its own, and torch.jit.script could take torch.nn.{stock.__name__}'s"
            " alone; use torch.compile or torch.export"
        )
    more = beyond_torch(module)
    if more is not None:
        raise InputError(
            f"torch.jit.script takes torch.nn.{stock.__name__}, which has no {more}; use torch.compile or torch.export"
        )
    twin = stock.__new__(stock)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in _OURS})
    return twin


def not_scriptable(module: nn.Module) -> NoReturn:
    """As `__prepare_scriptable__` of what torch has no class for."""
    raise InputError(
        f"fastseq.{type(module).__name__} has no form for torch.jit.script; use torch.compile or torch.export"
    )


class _Unquantized:
    """`qconfig`, which torch.ao.quantization sets on every module, also on those it then leaves as they are."""

    def __get__(self, module: nn.Module | None, owner: type[nn.Module]) -> Any:
        if module is None:
            return self
        if "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")
        return module.__dict__["qconfig"]

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["qconfig"] = value
        name, more = stock_class(type(module)).__name__, beyond_torch(module)
        remedy = (
            "call fastseq.accelerate(model, undo='all') first, which makes it torch's, without lengths= and resets="
            if more is None
            else f"torch.nn.{name}, which it quantizes, has no {more}"
        )
        warnings.warn(
            f"torch.ao.quantization looks for torch.nn.{name} by its exact type and leaves fastseq.{name} in floating"
            f" point; {remedy}",
            stacklevel=3,
        )

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["qconfig"]


def _signature(cls: type[nn.Module]) -> inspect.Signature:
    """Of `cls.__init__`, which takes *args as torch's do: torch.nn.utils.skip_init looks for `device` in it."""
    stock = stock_class(cls)
    layers = issubclass(stock, nn.RNNBase)
    given = dict(inspect.signature(nn.RNNBase.__init__ if layers else stock.__init__).parameters)
    given.pop("mode", None)
    if stock is not nn.LSTM:
        given.pop("proj_size", None)
    parameters = list(given.values())
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if stock is nn.RNN:  # behind self, input_size, hidden_size and num_layers
        parameters.insert(4, inspect.Parameter("nonlinearity", named, default="tanh", annotation=str))
    ours = inspect.signature(Recurrent.__init__).parameters.values()
    more = [p for p in ours if p.kind is p.KEYWORD_ONLY and (layers or p.name == "backend")]
    return inspect.Signature([*parameters, *more])
