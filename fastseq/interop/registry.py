"""What `accelerate` makes of toolkits' recurrent encoders and decoders: their own classes with another forward.

An adapter is a subclass of the toolkit's class, made when an instance of it is met, so that nothing is imported here
and isinstance, state_dict and signatures stay. It runs the steps as one operator, from the module's own parameters.
"""

from typing import Any

from torch import nn

from . import adapt_fairseq, adapt_joeynmt, adapt_opennmt
from .adapters import Adapter

__all__ = ["adapter_of", "known", "why_not"]

PARTS: dict[tuple[str, str], type[Adapter]] = {  # by module and name, of classes that may not be installed
    ("joeynmt.encoders", "RecurrentEncoder"): adapt_joeynmt.Encoder,
    ("joeynmt.decoders", "RecurrentDecoder"): adapt_joeynmt.Decoder,
    ("onmt.decoders.decoder", "InputFeedRNNDecoder"): adapt_opennmt.Decoder,
    ("fairseq.models.lstm", "LSTMDecoder"): adapt_fairseq.Decoder,
}
_made: dict[type, type[Adapter]] = {}


def known(kind: type) -> type[Adapter] | None:
    """Our part of the adapter of a toolkit's class; None for another class."""
    return PARTS.get((kind.__module__, kind.__qualname__))


def why_not(part: type[Adapter], module: nn.Module) -> str | None:
    """`part.obstacle` of an instance of the toolkit's own class; its structure may be another version's."""
    try:
        return part.obstacle(module)  # type: ignore[arg-type]
    except AttributeError as error:
        return f"it is not built as the versions that are known: {error}"


def adapter_of(stock: type[nn.Module]) -> type[Adapter]:
    """The class that instances of a known class become."""
    if stock not in _made:
        part = known(stock)
        assert part is not None
        names = {"stock": stock, "__doc__": part.__doc__, "__module__": __name__, "__reduce_ex__": _reduce}
        _made[stock] = type(stock.__name__, (part, stock), names)
    return _made[stock]


def _reduce(module: Adapter, protocol: Any) -> Any:
    """Copies and pickles name the toolkit's class and a function of ours: no import finds the adapter's class."""
    return _blank, (module.stock,), module.__dict__.copy()


def _blank(stock: type[nn.Module]) -> nn.Module:
    kind = adapter_of(stock)
    return kind.__new__(kind)
