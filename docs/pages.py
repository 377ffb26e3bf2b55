"""The site's sources: the pages of this folder, README and CONTRIBUTING, and pages of what `fastseq` exports.

python docs/pages.py build/pages
"""

import inspect
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

import fastseq

ROOT = Path(__file__).parents[1]
NAVIGATION = {
    "Ways in": ["readme", "replace", "modes", "build", "recipes", "train", "interop", "benchmark", "extend"],
    "How it works": ["gpu", "design", "kernels", "contributing"],
    "Reference": ["api/*"],
}
LAYERS = torch.nn.RNNBase, torch.nn.RNNCellBase
TOCTREE = "```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{pages}\n```\n"


def main(folder: Path) -> None:
    """Anew, in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder, ignore=shutil.ignore_patterns("__pycache__", "pages.py"))
    for name in ("README", "CONTRIBUTING"):
        shutil.copy(ROOT / f"{name}.md", folder / f"{name.lower()}.md")
    for page in folder.glob("*.md"):
        page.write_text(linked(page.read_text()))
    trees = [TOCTREE.format(caption=caption, pages="\n".join(pages)) for caption, pages in NAVIGATION.items()]
    index = folder / "index.md"
    index.write_text("\n".join([index.read_text(), *trees]))
    (folder / "api").mkdir()
    for name, text in reference().items():
        (folder / "api" / f"{name}.rst").write_text(text)


def linked(text: str) -> str:
    """With links to where the pages lie in the site; the licence is no page of it."""
    text = text.replace("[Apache-2.0](LICENSE)", "Apache-2.0")
    text = re.sub(r"\]\((?:\.\./|docs/)?(README|CONTRIBUTING)\.md", lambda m: f"]({m[1].lower()}.md", text)
    return text.replace("](docs/", "](")


def reference() -> dict[str, str]:
    """Page by page what `fastseq` exports, each thing once; modules have pages of their own."""
    things = {name: getattr(fastseq, name) for name in fastseq.__all__ if name != "__version__"}
    modules = [name for name, thing in things.items() if isinstance(thing, ModuleType)]
    functions = [name for name, thing in things.items() if inspect.isfunction(thing)]
    classes = [name for name, thing in things.items() if inspect.isclass(thing)]
    layers = [name for name in classes if issubclass(things[name], LAYERS)]
    parts = [name for name in classes if name not in layers]
    return {
        "layers": _page("Layers and cells", layers, "class"),
        "functions": _page("Functions", functions, "function"),
        "parts": _page("Parts of models, and other classes", parts, "class"),
    } | {name: _module(name) for name in modules}


def _page(title: str, names: list[str], kind: str) -> str:
    options = "\n   :members:\n" if kind == "class" else "\n"
    return "\n".join([_heading(title), *(f".. auto{kind}:: fastseq.{name}{options}" for name in names)])


def _module(name: str) -> str:
    title = f"fastseq.{name}"
    return "\n".join([_heading(title), f".. automodule:: {title}\n   :members:\n"])


def _heading(title: str) -> str:
    return f"{title}\n{'=' * len(title)}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
