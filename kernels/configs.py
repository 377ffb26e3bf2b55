"""Tile sizes as data: configs.json by kernel, dtype, size and device. The first row that fits wins.

A row, all of whose fields must be there:
  kernel   its name, as its launcher asks for it
  bits     of the input's dtype: [16], [32] or both
  hidden   [lowest, highest] of the size that decides (H of a layer, A of an attention); null: no limit
  devices  any of: "any", a backend ("cuda", "hip", "interpreter"), an architecture ("sm90", "gfx942")
  shared   bytes of shared memory that a device must offer one program; 0: whatever it has
  blocks   {name: tile size}, powers of two, handed to the kernel as constexpr BLOCK_<NAME>
  warps, stages
  because  the measurement that chose it, or "unmeasured: " and the reason for the guess
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .devices import Device

__all__ = ["TABLE", "Config", "Row", "choose", "find", "load"]


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into tiles."""

    blocks: Mapping[str, int]
    warps: int
    stages: int
    because: str

    @property
    def constants(self) -> dict[str, int]:
        """The blocks as constexpr parameters."""
        return {f"BLOCK_{name.upper()}": size for name, size in self.blocks.items()}


@dataclass(frozen=True)
class Row:
    """A config, and what it is for."""

    kernel: str
    bits: tuple[int, ...]
    hidden: tuple[int, int | None]
    devices: tuple[str, ...]
    shared: int
    config: Config

    def fits(self, kernel: str, bits: int, hidden: int, device: Device) -> bool:
        """Whether this row is for such a call on this device."""
        low, high = self.hidden
        return (
            kernel == self.kernel
            and bits in self.bits
            and low <= hidden
            and (high is None or hidden <= high)
            and device.shared >= self.shared
            and not {"any", device.backend, _architecture(device)}.isdisjoint(self.devices)
        )


def _architecture(device: Device) -> str:
    return f"sm{device.arch}" if device.backend == "cuda" else str(device.arch)


_FIELDS = {"kernel", "bits", "hidden", "devices", "shared", "blocks", "warps", "stages", "because"}


def _row(index: int, row: dict[str, Any]) -> Row:
    """One row of the file; ValueError naming it and the field that is wrong."""
    where = f"configs.json, row {index} ({row.get('kernel')})"
    if row.keys() != _FIELDS:
        raise ValueError(f"{where} has fields {sorted(row)}, expected {sorted(_FIELDS)}")
    low, high = row["hidden"]
    sound = {
        "bits": set(row["bits"]) in ({16}, {32}, {16, 32}),
        "hidden": low >= 1 and (high is None or high >= low),
        "devices": bool(row["devices"]) and all(isinstance(name, str) for name in row["devices"]),
        "shared": isinstance(row["shared"], int) and row["shared"] >= 0,
        "blocks": bool(row["blocks"]) and all(_power_of_two(size) for size in row["blocks"].values()),
        "warps": _power_of_two(row["warps"]) and row["warps"] <= 32,
        "stages": isinstance(row["stages"], int) and 1 <= row["stages"] <= 8,
        "because": isinstance(row["because"], str) and len(row["because"]) > 10,
    }
    for field, good in sound.items():
        if not good:
            raise ValueError(f"{where} has {field}={row[field]!r}; see kernels/configs.py")
    config = Config(MappingProxyType(row["blocks"]), row["warps"], row["stages"], row["because"])
    return Row(row["kernel"], tuple(row["bits"]), (low, high), tuple(row["devices"]), row["shared"], config)


def _power_of_two(n: Any) -> bool:
    return isinstance(n, int) and n > 0 and n & (n - 1) == 0


def load(text: str) -> tuple[Row, ...]:
    """The table that `text`, a JSON list of rows, holds; ValueError where it is wrong."""
    return tuple(_row(index, row) for index, row in enumerate(json.loads(text)))


TABLE: tuple[Row, ...] = load((Path(__file__).parent / "configs.json").read_text())


@lru_cache(maxsize=1024)
def find(kernel: str, dtype: torch.dtype, hidden: int, device: Device) -> Config | None:
    """The first row's config; None: the table has none, so this kernel is not for such a call."""
    bits = 8 * dtype.itemsize
    return next((row.config for row in TABLE if row.fits(kernel, bits, hidden, device)), None)


def choose(kernel: str, dtype: torch.dtype, hidden: int, device: Device) -> Config:
    """The first row's config of a kernel that has one for every call."""
    config = find(kernel, dtype, hidden, device)
    if config is None:
        raise LookupError(f"configs.json has no row of {kernel} for {dtype}, hidden={hidden} on {device.name}")
    return config
