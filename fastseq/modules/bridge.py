"""fastseq.Bridge: how a decoder's first state follows from what the encoder leaves.

Sutskever et al. 2014    every layer's last state: Bridge()
Bahdanau et al. 2014     A.2.2, tanh(W_s h) of the backward direction's last: Bridge("backward", act="tanh")
Nematus                  tanh of the memory's mean: Bridge("mean", act="tanh")
OpenNMT-py               one map over all layers: Bridge(map="joint", act="relu")
JoeyNMT                  one value for all layers: Bridge("top", map="shared", act="tanh", cell="same")
fairseq                  where sizes differ, one map for all layers' h and one for their c: Bridge(map="shared")
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import described, part
from ..errors import InputError
from ..spec import LayerState, Memory, one_of
from .attention import need_dtype, parameter

__all__ = ["Bridge", "BridgeMap", "StateMaker", "mean"]

StateMaker = Callable[[Memory], tuple[LayerState, ...]]

SOURCES = ("last", "top", "top_forward", "backward", "mean", "zero")
MAPS = ("copy", "per_layer", "shared", "joint")
ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "tanh": torch.tanh, "relu": torch.relu}


@part
@dataclass(frozen=True, repr=False)
class Bridge:
    """What a decoder's layers start from. A decoder takes one of these, or any function Memory -> layer states.

    source: "last", each layer's last state; "backward", its backward half; "top", the top layer's for all;
    "top_forward", its forward half; "mean", the memory's mean over attended positions; "zero". Of a layer with one
    direction a half is the whole: `Memory.dirs` says how many it has; without that, twice as wide as `size` means two.
    map: "copy"; "per_layer", a linear map for each decoder layer; "shared", one for all; "joint", one from all layers'
    values together to all layers. None: "copy", or with an `act` "per_layer". act follows the map.
    cell, of an LSTM: "own", from the memory's cell state by maps of its own; "same", the mapped h; "zero".
    layers: for "last" and "backward", which layers of the memory are read, one for each of the decoder's (joint: any
    number); None: one for one. size: features that a map reads of one layer; None: the decoder's memory_size, of a
    half half of it.
    """

    source: str = "last"
    map: str | None = None
    act: str | None = None
    bias: bool = True
    cell: str = "own"
    layers: tuple[int, ...] | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        one_of("source", self.source, SOURCES)
        if self.map is None:
            object.__setattr__(self, "map", "copy" if self.act is None or self.source == "zero" else "per_layer")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not all(isinstance(index, int) for index in self.layers):
                raise InputError(f"layers={self.layers}; they are numbers of the memory's layers, as in (0, 1)")
        if self.size is not None and self.size < 1:
            raise InputError(f"size={self.size}; it is at least 1")
        one_of("map", self.map, MAPS)
        one_of("act", self.act, tuple(ACTS))
        one_of("cell", self.cell, ("own", "same", "zero"))
        for refused, why in (
            (self.map == "copy" and self.act is not None, f"act={self.act!r} with map='copy'; use map='per_layer'"),
            (self.source == "zero" and self.map != "copy", f"map={self.map!r} with source='zero'; leave map out"),
            (
                self.layers is not None and self.source not in ("last", "backward"),
                f"layers={self.layers} with source={self.source!r}; they are for 'last' and 'backward'",
            ),
            (
                self.size is not None and self.map == "copy",
                f"size={self.size} with map='copy', which takes states of the decoder's size; use map='per_layer'",
            ),
        ):
            if refused:
                raise InputError(why)

    def __repr__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Bridge({', '.join([repr(self.source), *given])})"

    def config(self) -> dict[str, Any]:
        """The arguments that build it again, as plain data."""
        return described(self)

    @property
    def half(self) -> bool:
        """Whether one direction of two is read."""
        return self.source in ("top_forward", "backward")

    def build(
        self,
        hidden_size: int,
        num_layers: int,
        cell: str,
        memory_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "BridgeMap":
        """The module for a decoder of these sizes, with the parameters that the map needs."""
        if self.layers is not None and self.map != "joint" and len(self.layers) != num_layers:
            raise InputError(
                f"layers={self.layers} of a Bridge to {num_layers} layer(s); name one of the memory's for each of them"
            )
        return BridgeMap(self, hidden_size, num_layers, cell, memory_size, device, dtype)


class BridgeMap(nn.Module):
    """A Bridge with the parameters for one decoder: Memory -> a state for each layer.

    Parameters: h.0.weight, h.0.bias, ... of the maps to h, one for each layer (per_layer) or one in all; c.0.weight,
    ... likewise of an LSTM's cell="own".
    """

    tried: bool = False  # built for a remedy, which names no other

    def __init__(
        self,
        bridge: Bridge,
        hidden_size: int,
        num_layers: int,
        cell: str,
        memory_size: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bridge, self.hidden_size, self.num_layers, self.lstm = bridge, hidden_size, num_layers, cell == "lstm"
        self.memory_size = memory_size
        self.size = hidden_size
        if bridge.map != "copy":
            whole = hidden_size if memory_size is None else memory_size
            self.size = bridge.size or (max(1, whole // 2) if bridge.half else whole)
        read = len(bridge.layers or range(num_layers)) if bridge.source in ("last", "backward") else 1

        def maps() -> nn.ModuleList:
            factory: dict[str, Any] = {"bias": bridge.bias, "device": device, "dtype": dtype}
            if bridge.map == "joint":
                return nn.ModuleList([nn.Linear(read * self.size, num_layers * hidden_size, **factory)])
            count = {"copy": 0, "shared": 1}.get(bridge.map or "", num_layers)
            return nn.ModuleList([nn.Linear(self.size, hidden_size, **factory) for _ in range(count)])

        self.h = maps()
        self.c = maps() if self.lstm and bridge.cell == "own" else None

    def forward(self, memory: Memory) -> tuple[LayerState, ...]:
        """(h [B, H],) or (h, c) for each decoder layer. Raises InputError where the memory does not fit."""
        if self.bridge.source == "zero":
            zeros = _zeros(memory, self.hidden_size)
            return ((zeros, zeros) if self.lstm else (zeros,),) * self.num_layers
        h = self._mapped(self.h, self._read(memory, 0))
        if not self.lstm:
            return tuple((h_l,) for h_l in h)
        if self.bridge.cell == "same":
            return tuple((h_l, h_l) for h_l in h)
        if self.bridge.cell == "zero":
            return tuple((h_l, torch.zeros_like(h_l)) for h_l in h)
        assert self.c is not None
        return tuple(zip(h, self._mapped(self.c, self._read(memory, 1)), strict=True))

    def check(self, memory: Memory) -> None:
        """Raise what `forward` would of a memory of these shapes, which may be on the meta device; no map runs."""
        if self.bridge.source != "zero":
            for leaf in range(1 if self.c is None else 2):
                self._read(memory, leaf)

    def _mapped(self, maps: nn.ModuleList, values: list[Tensor]) -> list[Tensor]:
        """Values for the decoder's layers from those read: one for each, or one for all."""
        act, count = ACTS[self.bridge.act], self.num_layers
        if self.bridge.map == "joint":
            return list(act(maps[0](torch.cat(values, -1))).chunk(count, -1))
        if self.bridge.map == "per_layer":
            values = values if len(values) == count else values * count
            return [act(apply(value)) for apply, value in zip(maps, values, strict=True)]
        if self.bridge.map == "shared":
            values = [act(maps[0](value)) for value in values]
        return values if len(values) == count else values * count

    def _read(self, memory: Memory, leaf: int) -> list[Tensor]:
        """What the source has of h (leaf 0) or c (1)."""
        source, layers = self.bridge.source, self.bridge.layers
        if source == "mean":
            return [self._fitting(memory, mean(memory), "memory.out")]
        if memory.state is None:
            raise InputError(
                f"memory.state is None, but Bridge(source={source!r}) reads it; use Bridge('mean') or Bridge('zero')"
            )
        count = len(memory.state)
        if source in ("top", "top_forward"):
            layers = (count - 1,)
        elif layers is None:
            layers = tuple(range(self.num_layers))
            if count != self.num_layers:
                raise InputError(
                    f"memory.state has {count} layer(s), the decoder {self.num_layers}; name one of the memory's for"
                    f" each in Bridge(layers=...), or {self._remedy(memory)}"
                )
        if not all(-count <= index < count for index in layers):
            raise InputError(f"Bridge(layers={layers}), but memory.state has {count} layer(s), numbered from 0")
        return [self._half(memory, index, leaf) for index in layers]

    def _half(self, memory: Memory, index: int, leaf: int) -> Tensor:
        """The h or c of a layer of the memory, or the half that the source asks for."""
        assert memory.state is not None
        state, name = memory.state[index], f"memory.state[{index}]"
        if leaf >= len(state):
            raise InputError(
                f"{name} has no cell state, which Bridge(cell='own') of an LSTM reads; use cell='same' or 'zero':"
                f" {self._remedy(memory)}"
            )
        value = state[leaf]
        dirs = None if memory.dirs is None else memory.dirs[index]
        if self.bridge.half and dirs != 1 and value.shape[-1] == 2 * self.size:
            value = value.chunk(2, -1)[self.bridge.source == "backward"]
        return self._fitting(memory, value, name)

    def _fitting(self, memory: Memory, value: Tensor, name: str) -> Tensor:
        if value.dim() != 2 or value.shape[-1] != self.size:
            directions = ", or twice as many of two directions," if self.bridge.half else ""
            gives = f"[B, {value.shape[-1]}]" if value.dim() == 2 else str(tuple(value.shape))
            raise InputError(
                f"{name} gives {gives}; {self.bridge} reads [B, {self.size}]{directions} of it: {self._remedy(memory)}"
            )
        if len(self.h):
            weight = parameter(self.h[0], "weight")
            if "meta" not in (value.device.type, weight.device.type):  # where shapes alone are checked
                need_dtype(name, value, weight)
        return value

    def _remedy(self, memory: Memory) -> str:
        """The bridge nearest to this one that reads such a memory, as code; nothing where one is only being tried."""
        if self.tried:
            return ""
        cell = "lstm" if self.lstm else "gru"
        for bridge in self._others(memory):
            other = bridge.build(self.hidden_size, self.num_layers, cell, self.memory_size, device="meta")
            other.tried = True
            with contextlib.suppress(InputError):
                other.check(memory)
                return f"pass bridge={bridge}"
        return "pass bridge=Bridge('zero')"

    def _others(self, memory: Memory) -> Iterator[Bridge]:
        """Bridges like this one: those most like it first."""
        bridge, sizes = self.bridge, [self.bridge.size, None]
        read = [h for h, *_ in memory.state or ()] + ([] if memory.out is None else [memory.out])
        for width in dict.fromkeys(t.shape[-1] for t in read):
            sizes += [width // 2, width] if bridge.half and width > 1 else [width] if width else []
        sources = [(bridge.source, bridge.layers)]
        if bridge.source in ("last", "backward"):
            sources.append(("top", None))
        for source, layers in sources:
            for cell in (bridge.cell, "zero"):
                like = replace(bridge, source=source, layers=layers, cell=cell)
                yield like
                mapped = replace(like, map="per_layer" if like.map == "copy" else like.map)
                yield from (replace(mapped, size=size) for size in sizes)

    def extra_repr(self) -> str:
        return f"{self.bridge}"


def mean(memory: Memory) -> Tensor:
    """[B, D]: the mean of `out` over attended positions; 0 where there is none."""
    out, mask = memory.out, memory.mask
    if out is None:
        raise InputError("memory.out is None, but its mean is read; pass Memory(out) with [B, S, D]")
    if mask is None:
        return out.sum(1) / max(1, out.shape[1])
    count = mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask[..., None], out, 0.0).sum(1) / count


def _zeros(memory: Memory, size: int) -> Tensor:
    """[B, size] of the memory's rows, dtype and device."""
    like = memory.out if memory.out is not None else memory.state[0][0] if memory.state else None
    if like is None:
        raise InputError("memory has neither out nor state; pass one: a decoder's rows follow from it")
    return like.new_zeros(like.shape[0], size)
