"""Every preset, with every cell, on a GPU: each is a loop of its own, which is compiled for it."""

import pytest

from tests.decoder_oracle import PRESETS, check, preset
from tests.gpu.place import step
from tests.gpu.test_decoder import SOME

OTHERS = [name for name in PRESETS if name not in SOME]
GRID = [(name, cell) for cell in ("lstm", "gru", "gru_reset_before") for name in (*OTHERS, *SOME)]


@pytest.mark.parametrize(("name", "cell"), [pair for pair in GRID if pair != ("cho", "gru_reset_before")])
def test_every_preset(name: str, cell: str) -> None:
    check(step, preset(name, cell))
