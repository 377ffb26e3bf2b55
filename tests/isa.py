"""The ISA variants of the kernels, for tests of each."""

import pytest

from fastseq import _native

VARIANTS = ("base", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def choose(isa: str) -> None:
    """Use this variant until the test ends (conftest puts the old one back)."""
    if isa not in _native.C.isa_available():
        pytest.skip(f"this CPU, or the compiler of this build, has no {isa}")
    _native.C.choose_isa(isa)
    assert _native.C.isa() == isa
