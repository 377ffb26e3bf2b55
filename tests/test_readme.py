"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block, in order, in one namespace and folder; `fastseq.explain` has a transcript of its own."""
    for needed in ("safetensors", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    ran = [block for block in blocks if ">>>" not in block]
    assert len(ran) >= 7
    names: dict[str, Any] = {}
    torch.set_num_threads(2)
    for block in ran:
        exec(compile(block, str(README), "exec"), names)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "alignment.png"}
    assert names["weights"].shape == (8, 9, 11)
