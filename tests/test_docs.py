"""The pages of docs/, README and CONTRIBUTING: their examples run, their commands and links lead somewhere."""

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"", "text", "python", "sh"}  # "" is a diagram, or what a program printed
COMMAND = re.compile(r"(?:^ *|`|\$ )(?:[A-Z]+=\S+ )*(?:\S*/)?(make|python -m) (\S+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def run(page: Path) -> dict[str, Any]:
    """The names that a page's Python blocks leave, in order and in one namespace; transcripts (>>>) are left out."""
    text = page.read_text()
    names: dict[str, Any] = {"__name__": page.name}
    for match in FENCE.finditer(text):
        if match[1] == "python" and ">>>" not in match[2]:
            line = text[: match.start(2)].count("\n")
            exec(compile("\n" * line + match[2], page.name, "exec"), names)
    return names


def commands(page: Path) -> set[tuple[str, str]]:
    """("make", target) and ("python -m", module) of a page's blocks, indented or fenced, and of its text."""
    return {(kind, name.strip("`.,;:)")) for kind, name in COMMAND.findall(page.read_text())}


def anchors(page: Path) -> set[str]:
    """GitHub's, of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return page.name


def learned(page: str, names: dict[str, Any], folder: Path) -> None:
    """What an example says that it comes to, beside what it asserts itself."""
    if page == "README.md":
        assert {p.name for p in folder.iterdir()} == {"translate.safetensors", "alignment.png"}
        assert names["translation"] == "a bird sleeps"  # a pair that it never saw
    elif page == "build.md":
        assert names["weights"].shape == (8, 9, 11)
    elif page == "recipes.md":
        assert names["coverage_loss"].item() > 0
        assert names["copied"].tolist() == [40, 41, 40]
        assert names["together"].sequences.shape[:2] == (3, 1)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder."""
    if "save(" in page.read_text():
        pytest.importorskip("safetensors")
    if "pictures." in page.read_text():
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = run(page)
    has_examples = "```python" in page.read_text()
    assert has_examples == ("fastseq" in names)
    learned(page.name, names, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, as the transcript's")
def test_the_transcript_of_the_readme() -> None:
    """What it prints, but for the backend whose reason names the compiler's version."""
    (block,) = (match[2] for match in FENCE.finditer((ROOT / "README.md").read_text()) if ">>> " in match[2])
    command, _, printed = block.removeprefix(">>> print(").partition(")\n")
    found = str(eval(command, {"fastseq": fastseq, "torch": torch})).splitlines()
    assert [line.split()[:2] for line in found] == [line.split()[:2] for line in printed.splitlines()]
    assert [line for line in found if " cuda " not in line] == [
        line for line in printed.splitlines() if " cuda " not in line
    ]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_are_python_commands_or_text(page: Path) -> None:
    assert {match[1] for match in FENCE.finditer(page.read_text())} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for group in targets for name in group.split()}
    for kind, name in commands(page):
        if kind == "make":
            assert name in targets or "=" in name, f"{page.name}: make {name}"
        else:
            assert name in ("pip", "pytest") or importlib.util.find_spec(name), f"{page.name}: python -m {name}"


def test_commands_are_found_in_blocks_and_text() -> None:
    found = set().union(*map(commands, PAGES))
    assert found >= {("make", "test"), ("make", "foreign"), ("make", "docs"), ("python -m", "benchmarks")}
    assert ("python -m", "examples.trainers.plain") in found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            other = page.parent / path if path else page
            assert other.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {link}"


def test_the_site_has_every_page_and_everything_exported(tmp_path: Path) -> None:
    """`make docs` builds it, where Sphinx refuses what it cannot resolve."""
    pages = runpy.run_path(str(ROOT / "docs" / "pages.py"))
    pages["main"](tmp_path / "pages")
    listed = [name for names in pages["NAVIGATION"].values() for name in names]
    made = {str(page.relative_to(tmp_path / "pages").with_suffix("")) for page in tmp_path.rglob("*.md")}
    assert sorted(listed) == sorted((made | {"api/*"}) - {"index"})
    reference = "".join(page.read_text() for page in (tmp_path / "pages" / "api").iterdir())
    named = re.findall(r"^.. auto\w+:: fastseq\.(\w+)$", reference, re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(fastseq.__all__)
    readme = (tmp_path / "pages" / "readme.md").read_text()
    assert "](docs/" not in readme
    assert "](contributing.md)" in readme
