"""The examples of README and recipes run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(page: str) -> dict[str, Any]:
    """The names that a page's Python blocks leave, in order and in one namespace; transcripts (>>>) are left out."""
    text = (ROOT / page).read_text()
    names: dict[str, Any] = {"__name__": page}
    torch.set_num_threads(2)
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if ">>>" not in match[1]:
            line = text[: match.start(1)].count("\n")
            exec(compile("\n" * line + match[1], page, "exec"), names)
    return names


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("safetensors", "matplotlib"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    names = run("README.md")
    assert {p.name for p in tmp_path.iterdir()} == {"translate.safetensors", "alignment.png"}
    assert names["translation"] == "a bird sleeps"  # a pair that it never saw
    assert names["weights"].shape == (8, 9, 11)


def test_the_recipes() -> None:
    """Each asserts something of its own; what was learned is seen here."""
    names = run("docs/recipes.md")
    assert names["coverage_loss"].item() > 0
    assert names["copied"].tolist() == [40, 41, 40]
    assert names["together"].sequences.shape[:2] == (3, 1)
